import sys
from pathlib import Path

# accuracy.py, beside this file, is the one yardstick of all parity tests.
sys.path.insert(0, str(Path(__file__).parent))
