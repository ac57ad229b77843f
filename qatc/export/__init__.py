"""Other runtimes' formats."""

from qatc.export.formats import FORMATS, export

__all__ = ["FORMATS", "export"]
