"""The Python client against a real server."""

from rpc.client import ContinuoClient


async def test_the_example_of_the_readme_runs(server, capsys):
    async with ContinuoClient(server.address) as client:
        chat = await client.open(system="Be brief.")
        async for delta in chat.say("My cat is called Miso."):
            print(delta.text, end="", flush=True)
        turn = await chat.say("What is my cat called?")
        print(turn.text, turn.usage.cached_device_tokens)
        chat = await client.resume(chat.id)
        assert chat.committed_turns == 2
    shown = capsys.readouterr().out
    assert shown.startswith("You said: My cat is called Miso.You said: What is my cat called? 5")
