"""Four host devices for every test, so that multi-device programs are tested as such.

Programs of tests are tiny and run a few times: compiling them without LLVM's optimisations, and
with XLA's older emitters of loops, takes a third of the time and changes no more than rounding.
Workers, and processes that tests start, share what they have compiled, in a folder of this run
alone.
"""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="instanas_jax_compiled_")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
