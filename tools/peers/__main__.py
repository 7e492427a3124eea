"""python -m tools.peers: quiets gRPC, which listens only before it is imported."""

import os
import sys
from importlib import import_module

if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it remarks on every server started beside open channels
    sys.exit(import_module("tools.peers.command").main())
