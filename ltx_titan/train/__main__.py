"""Body of a rank: `python -m ltx_titan.train job.toml`, started by torchrun."""

import faulthandler

from ltx_titan.parallel.stop import end_with_launcher
from ltx_titan.train.entry import run

end_with_launcher()
faulthandler.enable()  # a crash in native code ends with the Python stack that led there
run()
