from __future__ import annotations

import importlib.metadata
import importlib.util
import pickle
import subprocess
import sys
import types

import pytest

import mambakit.compat
from mambakit.compat import installation
from mambakit.compat.mamba_ssm.models.config_mamba import MambaConfig
from mambakit.errors import MambakitError


@pytest.fixture(autouse=True)
def _uninstalled():
    yield
    mambakit.compat.uninstall()
    assert not {*sys.modules} & {*installation.NAMES}


MODULES = (
    "mamba_ssm", "mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton.selective_state_update",
    "mamba_ssm.ops.triton.layer_norm", "mamba_ssm.ops.triton.layernorm", "mamba_ssm.modules.mamba_simple",
    "mamba_ssm.modules.block", "mamba_ssm.models.config_mamba", "mamba_ssm.models.mixer_seq_simple",
    "mamba_ssm.utils.generation", "mamba_ssm.utils.hf", "causal_conv1d", "causal_conv1d.causal_conv1d_interface",
    "causal_conv1d.causal_conv1d_varlen", "causal_conv1d.cpp_functions", "selective_scan_cuda",
)  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_each_module_is_ours_under_both_names(name):
    mambakit.compat.install()
    module = importlib.import_module(name)
    assert module is importlib.import_module(f"mambakit.compat.{name}")
    assert module.__spec__.name == module.__name__ == f"mambakit.compat.{name}"


def test_names_of_the_packages():
    mambakit.compat.install()
    import causal_conv1d
    import mamba_ssm

    assert mamba_ssm.Mamba is mamba_ssm.modules.mamba_simple.Mamba
    assert mamba_ssm.MambaLMHeadModel is mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel
    assert mamba_ssm.selective_scan_fn is mamba_ssm.ops.selective_scan_interface.selective_scan_fn
    assert callable(mamba_ssm.mamba_inner_fn)
    assert callable(mamba_ssm.ops.triton.selective_state_update.selective_state_update)
    assert callable(causal_conv1d.causal_conv1d_fn)
    assert callable(causal_conv1d.causal_conv1d_update)


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from mamba_ssm import Mamba2", r"mamba_ssm\.Mamba2"),
        ("from mamba_ssm import Mamba, Mamba3", r"mamba_ssm\.Mamba3"),
        ("from mamba_ssm.modules.mamba2 import Mamba2", r"mamba_ssm\.modules\.mamba2"),
        ("import mamba_ssm.ops.triton.ssd_combined", r"mamba_ssm\.ops\.triton\.ssd_combined"),
        ("import mamba_ssm.modules.mha", r"mamba_ssm\.modules\.mha"),
    ],
)
def test_what_is_not_here_is_named_with_the_remedy(statement, name):
    mambakit.compat.install()
    message = rf"^{name}: not in mambakit, .* no Mamba-2 .*uninstall\(\) .* install the package mamba-ssm$"
    with pytest.raises(ImportError, match=message):
        exec(statement)


def test_to_ask_for_what_is_not_here():
    mambakit.compat.install()
    mamba_ssm = importlib.import_module("mamba_ssm")
    assert getattr(mamba_ssm, "Mamba2", None) is None
    with pytest.raises(ModuleNotFoundError, match=r"causal_conv1d\.cuda: .*package causal-conv1d"):
        importlib.import_module("causal_conv1d.cuda")


def test_how_other_programs_ask():
    for name in ("mamba_ssm", "causal_conv1d"):
        assert importlib.util.find_spec(name) is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("mamba_ssm")
    mambakit.compat.install()
    for name in ("mamba_ssm", "causal_conv1d"):
        assert importlib.util.find_spec(name) is not None
        module = importlib.import_module(name)
        assert importlib.util.find_spec(name) is not None
        for spelling in (name, name.replace("_", "-")):
            assert importlib.metadata.version(spelling) == module.__version__
    assert "mamba-ssm" in {found.metadata["Name"] for found in importlib.metadata.distributions()}
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("mamba_ssm_extras")


def test_twice_is_once():
    before = len(sys.meta_path)
    mambakit.compat.install()
    between = len(sys.meta_path)
    mambakit.compat.install()
    assert len(sys.meta_path) == between > before
    mambakit.compat.uninstall()
    assert len(sys.meta_path) == before
    mambakit.compat.uninstall()


def test_again_after_uninstall():
    mambakit.compat.install()
    first = importlib.import_module("mamba_ssm")
    mambakit.compat.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm")
    mambakit.compat.install()
    assert importlib.import_module("mamba_ssm") is first


def test_a_package_of_that_name_that_is_imported_already(monkeypatch):
    other = types.ModuleType("mamba_ssm")
    other.__file__ = "/somewhere/mamba_ssm/__init__.py"
    monkeypatch.setitem(sys.modules, "mamba_ssm", other)
    before = list(sys.meta_path)
    with pytest.raises(
        MambakitError, match="mamba_ssm: already imported from /somewhere/.*before the first"
    ):
        mambakit.compat.install()
    assert sys.meta_path == before
    monkeypatch.delitem(sys.modules, "mamba_ssm")


def test_a_package_of_that_name_that_is_installed_gives_way(tmp_path, monkeypatch):
    package = tmp_path / "mamba_ssm"
    package.mkdir()
    (package / "__init__.py").write_text("theirs = True\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    mambakit.compat.install()
    import mamba_ssm

    assert not hasattr(mamba_ssm, "theirs")
    mambakit.compat.uninstall()
    importlib.invalidate_caches()
    assert importlib.import_module("mamba_ssm").theirs
    del sys.modules["mamba_ssm"]


def test_pickles_by_either_name():
    config = MambaConfig(d_model=8)
    ours = pickle.dumps(config, protocol=0)
    mambakit.compat.install()
    theirs = ours.replace(b"cmambakit.compat.mamba_ssm", b"cmamba_ssm")
    assert theirs != ours
    assert pickle.loads(theirs) == config
    mambakit.compat.uninstall()
    assert pickle.loads(ours) == config


def test_to_install_loads_no_torch():
    script = "import sys, mambakit.compat as c; c.install(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
