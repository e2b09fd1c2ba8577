"""lib.kernels.dispatch: which implementation runs, what is said when one is missing, bad input."""

import subprocess
import sys
import warnings

import pytest
import torch

from lib.errors import BookError
from lib.kernels import dispatch as d

REFERENCE, CPU, TRITON = (lambda name=name: name for name in ("reference", "cpu", "triton"))
ALL = dict(reference=REFERENCE, cpu=CPU, triton=TRITON)
HERE = torch.ones(2)


def test_the_device_chooses():
    assert d.dispatch(HERE, **ALL) is CPU
    assert d.dispatch(HERE.to("meta"), **ALL) is REFERENCE
    assert d.dispatch(HERE, REFERENCE) is REFERENCE
    assert d.dispatch(HERE, REFERENCE, triton=TRITON) is REFERENCE


def test_a_shape_that_is_not_worth_it_runs_the_reference_unless_forced():
    assert d.dispatch(HERE, **ALL, worth=False) is REFERENCE
    with d.using("cpu"):
        assert d.dispatch(HERE, **ALL, worth=False) is CPU


@pytest.mark.parametrize(
    "name, chosen", [("reference", REFERENCE), ("cpu", CPU), ("triton", TRITON)]
)
def test_using_forces_one_backend_and_ends(name, chosen):
    with d.using(name), d.using(name):
        assert d.dispatch(HERE, **ALL) is chosen
    assert d.dispatch(HERE, **ALL) is CPU
    with pytest.raises(BookError, match='no backend "gpu"; there are reference, cpu and triton'):
        with d.using("gpu"):
            pass


@pytest.mark.parametrize(
    "name, module, forced", [("Numba", "numba", "cpu"), ("Triton",) * 2 + ("triton",)]
)
def test_a_missing_backend_is_told_once(monkeypatch, name, module, forced):
    monkeypatch.setattr(d, module.lower(), None)
    monkeypatch.setattr(d, "_told", set())
    with d.using(forced):
        with pytest.warns(
            UserWarning, match=f"{name} is not installed.*pip install {module.lower()}"
        ):
            assert d.dispatch(HERE, **ALL) is REFERENCE
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert d.dispatch(HERE, **ALL) is REFERENCE


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        d.dispatch(HERE, **ALL)
        assert d.numba.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_every_kernel_imports_without_numba_and_triton():
    code = (
        "import sys, pkgutil, importlib\n"
        "sys.modules['numba'] = sys.modules['triton'] = None\n"
        "import lib.kernels as k\n"
        "for m in pkgutil.iter_modules(k.__path__):\n"
        "    importlib.import_module('lib.kernels.' + m.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_check_returns_sizes_and_names_what_is_wrong():
    w, x = torch.ones(2, 3), torch.ones(5, 4, 3)
    assert d.check(w=(w, "m n"), x=(x, "... n")) == {"m": 2, "n": 3}
    assert d.check(w=(w, "m 3", (torch.float32,))) == {"m": 2}
    for arguments, says in [
        (dict(w=(w, "m n"), x=(torch.ones(4), "n")), r"x is \[4\]; it must be \[n\] with n = 3"),
        (dict(w=(w, "m")), r"w is \[2, 3\]; it must be \[m\]"),
        (dict(w=(w, "m 4")), r"w is \[2, 3\]; it must be \[m, 4\] with 4 = 4"),
        (dict(w=(w, "m n", (torch.int8, torch.int16))), "w is float32; it must be int8 or int16"),
        (dict(w=([1.0], "m")), r"w is a list; it must be a tensor \[m\]"),
        (dict(w=(w, "m n"), x=(w.to("meta"), "m n")), "x is on meta, w on cpu; use one device"),
    ]:
        with pytest.raises(BookError, match=says):
            d.check(**arguments)


def test_an_operation_without_gradient_says_so():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(BookError, match=r"scan has no gradient; call it under torch.no_grad\(\)"):
        d.refuse_gradient("scan", [HERE, x])
    with torch.no_grad():
        d.refuse_gradient("scan", [HERE, x])
