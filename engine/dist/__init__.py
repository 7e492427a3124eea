"""Ranks that lend one another memory: what they decide and what they say, as integers.

Words.  A *rank* is one complete engine.  The *home* of a conversation is the rank that computes it; an
*rBlock* is a block that may lie on another rank, the *holder*.  Home is then the *debtor*, the holder the
*creditor*, and a *loan* the blocks of one conversation that moved together.

entries.py       messages, orders, and what a manager wants done
rmanager.py      a rank's part: rblock_table.py says whose every slot is, lending.py is the creditor's side
                 of a loan, borrowing.py the debtor's (debt.py its record), settings.py how long they wait
gmanager.py      the one who sees all ranks, made of heartbeats: ledger.py who has what and who owes whom,
                 settlement.py debts that cancel out (DGFM), placement.py moves that make all ranks together
                 faster by the model in performance.py
hops.py          where idle KV sleeps: own device, own host, another rank's device, its host, or nowhere
outbox.py        what waits to be said and done

Nothing here knows sockets, threads, tensors or clocks.  A call is told the time, changes integers and leaves
messages and actions to be collected.  So the same code runs in tests that lose, delay, repeat and reorder
messages, in the simulator, and beside an engine.

How an engine will use it.

Cache manager.  `RManager` takes the two `BlockPool`s that serve the engine's own conversations.  Where
`engine.cache.tiers` takes a slot it will call `allocate`, and `free` where it gives one back; lent blocks are
then simply slots that are not free.  A block that several conversations share is entered under whichever
brought it.  Out of slots, it first evicts what is idle; then `recall` wants back what was lent, or `borrow`
moves leading blocks elsewhere.  It hears the outcome as actions, in terms of slots and loans:

    BlocksMoved  these slots are free, their blocks are now so many of that loan: residency remote
    BlocksHome   these blocks of the loan are in those slots
    BlocksLost   these are nowhere: dropped, and computed from tokens when they are needed
    MoveFailed   all is where it was

The newest block on the device is never moved, for it is still written to; new KV is always written at home.

Data plane.  `SendBlocks` and `FetchBlocks` name slots here and a loan there.  The holder asks `hold` before
anything reads or writes a loan's slots, be it a copy or a step of attention, and `let_go` at its end.  `hold`
says None for a loan that is over: then its slots serve others, and nothing may be read or written.  Loans are
named by the creditor, with its epoch, and never twice, so the name is the generation of the blocks.  Each
action is answered once, by `sent` or `fetched`, however the copy ended; until then its slots stay taken.

Control plane.  It carries `Message`s between ranks, and between ranks and the gManager on rank 0, with `tick`
called a few times per `reply_s`.  What is lost is said again until it is answered, what comes twice or late
changes nothing; a reservation that is not committed in time expires.  `epoch` and `term` come from the
launcher, greater than any before: a rank whose life the others take for over is asked to `rejoin` with a new
one.  When its transport sees a peer die it calls `lose`; without that the gManager notices the silence.  The
scheduler tells `RManager.batch`, `waiting` and `waiting_blocks`, which placement goes by.

Not here yet.  Attention over remote blocks and every transport; launching, joining and the secret; handing
a conversation over to another home, and its streams; the cache manager's remote residency; a choice between
`borrow` and `hops` for idle conversations.  The placement map does not say which conversations run: all in it
count as attended to in every step.  A ring of debts in which not one block is free anywhere is not settled,
as nothing is exchanged through a buffer.  A debtor that has no room for recalled blocks does not look for
another creditor: they are dropped when the recall ends.
"""
