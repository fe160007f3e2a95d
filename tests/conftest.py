"""Four host devices for every test, so that multi-device programs are tested as such.

Programs of tests are tiny and run a few times: compiling them without LLVM's optimisations takes
half the time and changes no more than rounding.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
)
