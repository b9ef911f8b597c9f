"""How is the demo started? `python -m examples.shop`, from the root of the repository."""

from __future__ import annotations

import asyncio
import os
import sys

from examples.shop.demo import main

sys.exit(asyncio.run(main(float(os.environ.get("DEMO_SECONDS", "45")))))
