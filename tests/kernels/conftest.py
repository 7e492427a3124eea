"""What tools/sanitize.sh asks for: the C kernels built with sanitizers."""

import os

from kernels.native import build

if sanitizers := os.environ.get("CONTINUO_SANITIZE"):
    build._SANITIZER_FLAGS = (
        f"-fsanitize={sanitizers}",
        *("-fno-sanitize-recover=all", "-O1", "-g", "-fno-omit-frame-pointer"),
    )
