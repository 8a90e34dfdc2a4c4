"""Released pickles are read as data; nothing in them runs."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest

from mmseg_llm.data import load_plain_pickle
from mmseg_llm.data.unpickle import ForbiddenGlobalError

PLAIN = [
    {"ref_id": 1, "sent_ids": [1, 2], "box": (1.5, 2.0), "tokens": {"a", "b"}, "raw": b"x", "none": None, "ok": True}
]


class Exploit:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write(path, value, protocol=2):
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values(tmp_path, protocol):
    value = PLAIN if protocol >= 4 else [{key: item for key, item in PLAIN[0].items() if key not in {"tokens", "raw"}}]
    assert load_plain_pickle(write(tmp_path / "refs.p", value, protocol)) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_does_not_run(tmp_path, protocol):
    flag = tmp_path / "ran"
    path = write(tmp_path / "refs(unc).p", [{"ref_id": 1}, Exploit(flag)], protocol)
    with pytest.raises(ForbiddenGlobalError, match=r"refs\(unc\)\.p asks for the global .*system.*nothing was run"):
        load_plain_pickle(path)
    assert not flag.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"(S'1'\nibuiltins\neval\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x011\x85R.",  # STACK_GLOBAL
        b"\x80\x02Ppersistent\n.",
    ],
)
def test_every_way_to_a_global_is_refused(tmp_path, program):
    path = tmp_path / "refs.p"
    path.write_bytes(program)
    with pytest.raises(ValueError, match=r"refs\.p"):
        load_plain_pickle(path)


@pytest.mark.parametrize("value", [OrderedDict(a=1), np.float64(1), Exploit, object()])
def test_even_harmless_globals_are_refused(tmp_path, value):
    with pytest.raises(ForbiddenGlobalError):
        load_plain_pickle(write(tmp_path / "refs.p", value))


def test_python_2_strings(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(b"\x80\x02U\x05caf\xc3\xa9.")
    assert load_plain_pickle(path) == "caf\u00e9"
    path.write_bytes(b"\x80\x02U\x04caf\xe9.")
    assert load_plain_pickle(path) == "caf\u00e9"


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80\x02}q", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x63."]
)
def test_damaged_file(tmp_path, content):
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\.p is not a pickle of plain"):
        load_plain_pickle(path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.p does not exist"):
        load_plain_pickle(tmp_path / "none.p")
