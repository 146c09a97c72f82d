"""What libtpu is told on a machine without TPUs, where it may be installed to compile ahead (`jaxmech.ahead`)."""

from __future__ import annotations

import os

_WITHOUT_CHIPS = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a lock keeps processes from sharing chips; compilers need none
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # else libtpu complains that it cannot get it from the machine
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def quiet_without_chips() -> None:
    """Keeps libtpu, which JAX tries first wherever it is installed, from printing errors where JAX found no chip."""
    if os.environ.get("TPU_SKIP_MDS_QUERY"):  # JAX sets it at import where it finds none
        for variable, value in _WITHOUT_CHIPS.items():
            os.environ.setdefault(variable, value)
