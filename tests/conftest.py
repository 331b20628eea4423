"""What all tests share: no test reads or writes the user's own cache."""

import os
import tempfile

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="wanjax-tests-")
