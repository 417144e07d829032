import sys
from pathlib import Path

# examples.py beside this file, and the yardstick of the parity tests.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "parity")]
