r"""A server that others can reach wants a token from every caller and encrypts the line.

openssl req -x509 -newkey rsa:2048 -nodes -days 365 -keyout key.pem -out cert.pem -subj /CN=localhost \
    -addext subjectAltName=DNS:localhost
echo "alice $(openssl rand -hex 24)" > tokens && chmod 600 tokens
continuo serve --listen 0.0.0.0:50051 --token-file tokens --tls-cert cert.pem --tls-key key.pem

TOKEN=... python token_and_tls.py localhost:50051 cert.pem
"""

import asyncio
import os
import sys

from rpc.client import ContinuoClient, Unauthenticated


async def main(address: str, authorities: str) -> None:
    async with ContinuoClient(address, tls=authorities) as stranger:
        try:
            await stranger.open()
        except Unauthenticated as error:
            print(f"without a token: {error}")

    # tls=True trusts the system's authorities, as for a certificate that was bought.
    async with ContinuoClient(address, tls=authorities, token=os.environ["TOKEN"]) as client:
        chat = await client.open(labels={"from": "token_and_tls"})
        print((await chat.say("Hello.")).text)
        async for mine in client.list({"from": "token_and_tls"}):  # nobody else's are ever listed
            print(mine.conversation_id, mine.num_tokens)
        await chat.close(delete=True)


asyncio.run(main(*sys.argv[1:]))
