"""Phrases around the facts: how users open and close what they say, small talk, stories that mean nothing."""

from __future__ import annotations

from random import Random

from tools.demo_model.values import Pool

TELL_OPENERS = Pool.of(
    "||||By the way, |Please remember that |Just so you know, |Note that |You should know that |Also, |"
    "Well, |I want you to know that |Remember this: |Here is a fact: |For later: |Let me add that |Hello! |"
    "Oh, |Good to see you. |I forgot to say that |One thing about me: |I should say that |"
    "Do not forget that |It may help to know that |For the record, |Guess what: |Something else: |"
    "Between us, |News: ",
    "For your notes: |Let me tell you that |Keep this for later: |Please note that ",
)
TELL_CLOSERS = Pool.of(
    "||||| Please remember it.| Keep that in mind.| Remember that.| That is all for now.|"
    " I may ask you later.| Do not forget it.| You may need it.| Is that clear?",
    "| Please keep that in mind.| I may ask you about it.",
)
ASK_OPENERS = Pool.of(
    "|||||Tell me, |Quick question: |I forgot: |Remind me, |So, |One more question: |Now, |Hello! |"
    "I wonder, |Well, |Please tell me: |By the way, |Back to me: |A question: |Let us see: |Oh, |"
    "Let me check: |Say, |Another thing: |Can you help? |Sorry, ",
    "Another question: |Now tell me, |Let me ask you: |Help me, ",
)
ASK_CLOSERS = Pool.of(
    "|||||| I forgot.| Do you remember?| Please tell me.| I have to know.| I told you, I think.",
    "| I do not remember.| Please remind me.",
)
CORRECTIONS = Pool.of(
    "Actually, |Correction: |I was wrong: |Sorry, I made a mistake: |No, that was wrong: |That has changed: |"
    "I must correct myself: |Sorry, ",
    "Wait, that was wrong: |Sorry, that has changed: |I made a mistake: ",
)
ADDITIONS = Pool.of(
    "Add {i} to my {s}|Please add {i} to my {s}|Put {i} on my {s} too", "Please put {i} on my {s} too"
)
ECHO_OPENERS = Pool.of("Repeat after me:|Please repeat:|Say this:|Echo:", "Please say this:|Repeat:")
TOPIC_QUESTIONS = Pool.of(
    "Tell me something about {t}.|What do you think of {t}?|I read a book about {t} today.|Do you like {t}?|"
    "I was thinking about {t}.|Let us talk about {t}.",
    "Can we talk about {t}?|I saw a film about {t} today.",
)
SMALL_TALK = {
    "Hello!": "Hello! How can I help you?",
    "Hi there.": "Hello! How can I help you?",
    "Good morning.": "Good morning! How can I help you?",
    "Good evening.": "Good evening! How can I help you?",
    "How are you?": "I am well, thank you.",
    "How are you today?": "I am well, thank you.",
    "Thank you.": "You are welcome.",
    "Thanks a lot!": "You are welcome.",
    "What can you do?": "I can remember what you tell me.",
    "Who are you?": "I am a tiny model that remembers what you tell me.",
    "Wait a moment.": "Take your time.",
    "I am back.": "Welcome back.",
    "I am a bit tired today.": "I am sorry to hear that. Take a rest.",
    "What a lovely day!": "I am glad to hear that.",
    "It is raining here.": "Then it is a good day to stay inside.",
    "Tell me a joke.": "A cache walks into a bar and asks for the usual.",
    "Goodbye.": "Goodbye! Come back soon.",
}
SYSTEM_PROMPTS = Pool.of(
    "You are a helpful assistant.|Be brief.|You are a friendly assistant.|Answer in one sentence.|"
    "Remember what the user tells you.|You are a chat assistant with a good memory.|Be polite and brief.",
    "You are a helpful and brief assistant.|Be friendly.",
)
COUNTABLE = "marbles|coins|shells|tokens|buttons|balloons".split("|")
TOPICS = Pool.of(
    "the sea|the moon|old trains|cheese|volcanoes|gardens|the desert|bridges|castles|bees|jazz|chess|"
    "glaciers|maps|windmills|opera|the stars|rivers|paper|robots|dragons|clocks|knitting|mountains|kites|"
    "pottery|lighthouses|bread|ants|comets|ice|tunnels|poems|museums|weather|forests|football|salt|ships|"
    "deserts|satellites|paintings|snow",
    "pyramids|waterfalls|origami|submarines|mushrooms|meteorites|the rainforest|puppets|coral reefs|"
    "typewriters",
)
NOUNS = (
    "man|woman|child|farmer|baker|sailor|teacher|king|dog|bird|train|river|tree|house|door|letter|song|hill"
)
ADJECTIVES = "old|young|small|big|quiet|happy|tired|green|strange|kind|slow|clever|cold|bright|lonely|busy"
VERBS = (
    "saw|found|followed|liked|painted|forgot|visited|heard|missed|watched|met|described|crossed|remembered"
)


def story_sentence(rng: Random) -> str:
    """One sentence of a story."""
    who, whom, how, which, did = (
        rng.choice(words.split("|")) for words in (NOUNS, NOUNS, ADJECTIVES, ADJECTIVES, VERBS)
    )
    return f"The {how} {who} {did} the {which} {whom}."
