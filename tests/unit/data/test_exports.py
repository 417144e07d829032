from __future__ import annotations

import subprocess
import sys

import pytest

import mambakit.data


@pytest.mark.parametrize("name", mambakit.data.__all__)
def test_every_exported_name_is_what_it_says(name: str) -> None:
    assert getattr(mambakit.data, name).__name__ == name


def test_preparing_text_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "from mambakit.data import TextReader, TokenDataset, load_tokenizer, prepare, prepared\n"
        "load_tokenizer('bytes').encode('a')\n"
        "sys.exit(bool({'torch', 'datasets', 'tokenizers', 'pyarrow'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mambakit.data.nothing
