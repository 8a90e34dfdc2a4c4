"""Conversion of checkpoints that others released."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmseg_llm.lazy import lazy

if TYPE_CHECKING:
    from mmseg_llm.zoo.depthlm import convert_depthlm, export_depthlm, load_depthlm
    from mmseg_llm.zoo.segagent import convert_segagent, load_segagent
    from mmseg_llm.zoo.stamp import convert_stamp, load_stamp, state_dict_stamp

__all__ = [
    "convert_depthlm",
    "convert_segagent",
    "convert_stamp",
    "export_depthlm",
    "load_depthlm",
    "load_segagent",
    "load_stamp",
    "state_dict_stamp",
]

__getattr__ = lazy(
    __name__,
    {
        "convert_depthlm": "depthlm",
        "convert_segagent": "segagent",
        "convert_stamp": "stamp",
        "export_depthlm": "depthlm",
        "load_depthlm": "depthlm",
        "load_segagent": "segagent",
        "load_stamp": "stamp",
        "state_dict_stamp": "stamp",
    },
)
