"""Rank 0 waits for rank 1, which never comes."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from sft.utils import distributed
from sft.utils.errors import UserError

distributed.WAIT, distributed.SLICE = timedelta(seconds=1), timedelta(seconds=0.3)
if distributed.rank() == 1:
    distributed._channel()
    time.sleep(5)
else:
    try:
        distributed.barrier()
    except UserError as error:
        sys.exit(str(error))
