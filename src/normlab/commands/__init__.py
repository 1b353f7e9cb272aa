"""The commands of the command line, one a file: a dataclass of options with a ``run``."""

from normlab.commands.claims import Claims as Claims
from normlab.commands.compare import Compare as Compare
from normlab.commands.diagnose import Diagnose as Diagnose
from normlab.commands.doctor import Doctor as Doctor
from normlab.commands.list import List as List
from normlab.commands.report import Report as Report
from normlab.commands.show import Show as Show
