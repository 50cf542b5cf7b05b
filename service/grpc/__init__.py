"""gRPC, an extra. Nothing else imports this package unless `--grpc-port` is set."""

import os

# gRPC's core, which reads this when it is loaded, would write lines to standard error that any client can cause. What
# goes wrong in the server is also an exception or a status.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
