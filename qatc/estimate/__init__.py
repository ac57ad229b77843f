"""What a run takes, by a model's config alone: memory by phase, time, disk, what makes it fit.

=============  =====================================================================================
module         what
=============  =====================================================================================
``shapes``     the numbers of a model that all else follows from
``setup``      the options of a run that it depends on
``memory``     bytes of every phase, by what takes them; ``training`` those of training, ``parts``
               what phases have in common
``work``       seconds from operations and a throughput, and bytes on the disk
``fit``        the cheapest options with which a run fits
``fitting``    a run with them, for ``qatc quantize --fit``
``answer``     all of it together
``tables``     as rows to print
=============  =====================================================================================

:mod:`qatc.report.first_steps` measures what this reckons, once a run has begun.
"""

from qatc.estimate.answer import Estimate, estimate, parse_memory
from qatc.estimate.fit import Choice, fit
from qatc.estimate.memory import phases
from qatc.estimate.parts import PhaseMemory
from qatc.estimate.setup import Setup
from qatc.estimate.shapes import Shape, read_shape, shape_of
from qatc.estimate.work import Speed, measure_speed

__all__ = [
    "Choice",
    "Estimate",
    "PhaseMemory",
    "Setup",
    "Shape",
    "Speed",
    "estimate",
    "fit",
    "measure_speed",
    "parse_memory",
    "phases",
    "read_shape",
    "shape_of",
]
