"""Made by tools/generate_proto.sh from rpc/continuo.proto; do not edit."""
