"""The words between a served model and its clients: headers, the name of the whole backbone, the metrics' prefix.

This module imports nothing, so that a client of a server loads no torch to spell a header.
"""

from __future__ import annotations

EXIT_HEADER = "X-Early-Exit"
"""Response header: the layer path of the exit that answered, or `FULL_NAME`."""
CONFIDENCE_HEADER = "X-Early-Exit-Confidence"
"""Response header: the answer's calibrated probability, with four decimals."""
VERSION_HEADER = "X-Early-Exit-Version"
"""Response header: the version that answered."""
STEP_HEADER = "X-Early-Exit-Step"
"""Response header, set once the monitor has stepped back: the fallback level, of how many."""
SWITCH_HEADER = "X-Early-Exit-Switch"
"""Response header, set while the operator's switch is not on: "off", or "level N", the fallback level that answers at
least."""
ANYTIME_HEADER = "X-Early-Exit-Anytime"
"""A prediction request with this header asks for every exit's prediction, whatever the header's value. It costs a full
pass, so it counts only where the sender is known by `SECRET_HEADER`, or where the configuration opens it to clients."""
OPINIONS_HEADER = "X-Early-Exit-Opinions"
"""Response header: a JSON list of {"exit", "class", "confidence"} in the order of the backbone, the whole one last,
with "label" where the handler has an index_to_name.json. It takes some 60 bytes an exit; `EXIT_HEADER` names the exit
that answered."""
PROBE_HEADER = "X-Early-Exit-Probe"
"""A prediction request with this header is answered by the version's probe instead of the user's handler. It counts as
`ANYTIME_HEADER` does."""
PROBE_BODY = (b'{"instances": [{}], '
              b'"inputs": [{"name": "probe", "shape": [1], "datatype": "BYTES", "data": ["probe"]}]}')
"""The body of a probe, as JSON: every envelope of TorchServe takes it, and without one nobody reads it."""
SECRET_HEADER = "X-Early-Exit-Secret"
"""A prediction request with the server's secret in this header comes from its operator."""
SECRET_VARIABLE = "EARLY_EXIT_SECRET"
"""The secret of the server, in the environment of its workers. `ee-serve` sets this variable. An empty value is no
secret."""

FULL = -1
"""Exit number of an item that the whole backbone answered."""
FULL_NAME = "full"
"""Name that stands for the whole backbone where an exit's layer path would stand."""

METRIC_PREFIX = "ee_"
"""Every metric of ours begins with this."""
