#!/bin/sh
# The protocol by hand, with grpcurl (https://github.com/fullstorydev/grpcurl).  The server tells its own schema.
#
#     sh grpcurl.sh [HOST:PORT]
#
# With TLS leave -plaintext out; with tokens add -H 'authorization: Bearer TOKEN'.
set -eu
server=${1:-localhost:50051}

call() { # METHOD REQUEST...: several requests make up a stream
    method=$1; shift
    grpcurl -plaintext -d "$*" "$server" "continuo.v1.$method"
}

# The model, and one reply that nothing is remembered of
call Engine/GetModelInfo '{}'
call Engine/Generate '{"text": "Once upon a time", "sampling": {"maxTokens": 20}}'

# A conversation: told something, and asked for it by another call
call Conversations/Converse '{"open": {"conversationId": "by-hand", "system": "Be brief."}}' \
    '{"append": {"turnId": "t-1", "text": "My cat is called Miso."}}'
call Conversations/Converse '{"resume": {"conversationId": "by-hand"}}' \
    '{"turn": {"turnId": "t-2", "text": "What is my cat called?"}}'
call Conversations/Converse '{"resume": {"conversationId": "by-hand"}}' \
    '{"regenerate": {"turnId": "t-3", "sampling": {"temperature": 1.0, "seed": 7}}}'

# A copy of its first turn; then both are erased
call Conversations/Fork '{"conversationId": "by-hand", "newConversationId": "by-hand-2", "turns": 1}'
call Conversations/Get '{"conversationId": "by-hand-2"}'
call Conversations/List '{"pageSize": 10}'
call Conversations/Delete '{"conversationId": "by-hand"}'
call Conversations/Delete '{"conversationId": "by-hand-2"}'
