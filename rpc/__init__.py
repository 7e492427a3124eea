"""Conversations over gRPC: the protocol (continuo.proto), a server for an engine, and a Python client.

    server side   server     binds, authenticates, answers health checks, drains
                  servicer   the unary calls and `Generate`
                  stream     one `Converse` stream: a reader, a writer, an attachment between them
                  codec      proto messages <-> engine types
                  status     engine errors -> gRPC status
                  auth       who is calling
                  listen     what may be exposed how
                  backend    what all of this asks of an engine
    client side   client     `ContinuoClient`: the connection and the unary calls
                  chat       one conversation, over as many connections as it takes
                  converse_call  one of those connections
                  request    what may be asked for; reply, outcome: what comes back
                  failure    one exception per status

The client side imports neither torch nor the engine, so the base installation is enough for it.
"""
