"""`python -m benchmarks [options]`: everything in this folder, and one table. The options are pytest's, and --quick,
--threads, --device and --csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.exit(pytest.main([str(Path(__file__).parent), "--benchmark-only", "--benchmark-quiet", *sys.argv[1:]]))
