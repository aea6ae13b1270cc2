"""The names that a served model shares with its server and clients: headers, variables, and the prefix of metrics.

This module imports nothing, so that a client can use it without loading torch.
"""

from __future__ import annotations

EXIT_HEADER = "X-Early-Exit"
"""Response header: the layer path of the exit that answered, or `FULL_NAME`."""
CONFIDENCE_HEADER = "X-Early-Exit-Confidence"
"""Response header: the answer's calibrated probability, with four decimals."""
VERSION_HEADER = "X-Early-Exit-Version"
"""Response header: the version that answered."""
STEP_HEADER = "X-Early-Exit-Step"
"""Response header, set once the monitor has left fallback level 0: "N of M", the current level and the last one."""
SWITCH_HEADER = "X-Early-Exit-Switch"
"""Response header, set while the operator's switch is not on: "off", or "level N", where N is the lowest fallback level
that may answer."""
ANYTIME_HEADER = "X-Early-Exit-Anytime"
"""A prediction request with this header asks for every exit's prediction, whatever the header's value. It costs a full
pass, so the header is ignored without the right `SECRET_HEADER`, unless the configuration admits all clients."""
OPINIONS_HEADER = "X-Early-Exit-Opinions"
"""Response header: a JSON list of {"exit", "class", "confidence"} in the order of the backbone, the whole backbone
last, with "label" if the handler has an index_to_name.json. It takes about 60 bytes per exit; `EXIT_HEADER` names the
exit that answered."""
PROBE_HEADER = "X-Early-Exit-Probe"
"""A prediction request with this header is answered by the version's probe instead of the user's handler. The header is
ignored under the same conditions as `ANYTIME_HEADER`."""
PROBE_BODY = (b'{"instances": [{}], '
              b'"inputs": [{"name": "probe", "shape": [1], "datatype": "BYTES", "data": ["probe"]}]}')
"""The body of a probe: JSON that every envelope of TorchServe accepts. Without an envelope, nothing reads it."""
EXPLAIN_HEADER = "explain"
"""A request with this header asks the user's handler for an explanation instead of a prediction; servers set it."""
SECRET_HEADER = "X-Early-Exit-Secret"
"""A prediction request with the server's secret in this header comes from its operator."""
SECRET_VARIABLE = "EARLY_EXIT_SECRET"
"""The secret of the server, in the environment of its workers. `ee-serve` sets this variable. An empty value is no
secret."""
RECORDS_VARIABLE = "EARLY_EXIT_RECORDS"
"""The folder for the records, an absolute path, if the configuration names none. `ee-serve` sets this variable."""

FULL = -1
"""Exit number of an item that the whole backbone answered."""
FULL_NAME = "full"
"""The name of the whole backbone in places where an exit is named by its layer path."""

METRIC_PREFIX = "ee_"
"""The prefix of all metrics of this project."""
