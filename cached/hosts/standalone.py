"""The daemon alone on one machine: ``cached serve``.

A composition root: it builds the adapters, hands them to the daemon, and knows what starts
when. The HTTP side (aiohttp on uvloop, as slow to import as all the rest) starts once the
first GET is under way, or nothing is to be fetched.
"""

from __future__ import annotations

import os
import random
import threading
from typing import TYPE_CHECKING

import cached
from cached.adapters.clock import SystemClock
from cached.adapters.log import Log
from cached.adapters.memory import SystemMemory
from cached.adapters.segments import TmpfsSegments
from cached.adapters.unix_socket import UnixSocket
from cached.core import effects, events
from cached.core.engine import Engine
from cached.core.loads import Limits
from cached.core.reporting import About
from cached.daemon import Daemon, Inquiries, Mailbox, drain_on_signals
from cached.runner import Ports, Runner

if TYPE_CHECKING:
    from cached.core.config import Config
