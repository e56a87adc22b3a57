#!/usr/bin/env python3
"""Checks an export of a Daybook ledger with nothing but Python: python3 verify_export.py FILE

Written from the text of the format ("The log" in the API documentation), not from Daybook's code, so that an
auditor has something to compare `daybook verify` with, and can read it in five minutes. It checks positions,
leaves, roots, the chain, event ids, that every movement of money is balanced, and every wallet's balance.
Exit code 0: sound. 1: the first bad line is named. It cannot know whether the log was cut short or written anew
as a whole: compare the checkpoint it prints with one that you kept.
"""
import datetime
import decimal
import hashlib
import json
import struct
import sys
import uuid

decimal.getcontext().prec = 60


def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


def leaf(aggregate_type, aggregate_id, sequence, event_type, event_version, recorded_at, command_id, key_hash,
         request_hash, payload, metadata):
    """recorded_at in microseconds since 1970; command_id 16 bytes; absent hashes are b""; the rest is text."""
    number = lambda n: struct.pack(">q", n)
    fields = [aggregate_type.encode(), aggregate_id.encode(), number(sequence), event_type.encode(), event_version.encode(),
              number(recorded_at), command_id, key_hash, request_hash, payload.encode(), metadata.encode()]
    return sha256(b"\0", *(struct.pack(">I", len(field)) + field for field in fields))


def root(leaves):
    """The Merkle tree hash of RFC 6962 over leaves that are hashed already."""
    if len(leaves) <= 1:
        return leaves[0] if leaves else sha256()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return sha256(b"\1", root(leaves[:split]), root(leaves[split:]))


def chain(previous, commit_root, first, last):
    return sha256(previous, commit_root, struct.pack(">q", first), struct.pack(">q", last))


def genesis(ledger_id):
    return sha256(b"daybook", uuid.UUID(ledger_id).bytes)


def event_id(leaf_hash, webhook_type=""):
    """An event's id; with a type, the id under which a webhook reports it."""
    bits = bytearray(sha256(leaf_hash, webhook_type.encode())[:16])
    bits[6] = bits[6] & 0x0F | 0x80
    bits[8] = bits[8] & 0x3F | 0x80
    return f"evt_{uuid.UUID(bytes=bytes(bits))}"


def members(line):
    """The members of a JSON object, each value with its text as it stands in the line."""
    decoder, at, found = json.JSONDecoder(parse_float=decimal.Decimal), 1, {}
    assert line[0] == "{", "not an object"
    while line[at:] != "}":
        at += line[at] == ","
        key, at = decoder.raw_decode(line, at)
        assert line[at] == ":" and key not in found, f"not an object of single members: {key}"
        value, end = decoder.raw_decode(line, at + 1)
        found[key] = (value, line[at + 1:end])
        at = end
    return found


def micros(text):
    at = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ")
    return (at - datetime.datetime(1970, 1, 1)) // datetime.timedelta(microseconds=1)


def fold(event_type, payload, wallets):
    """What an event says about balances must be what the events before it come to."""
    body, = payload.values()
    assert list(payload) == [event_type], "the payload's only key is the event's type"
    if event_type == "WalletOpened":
        return
    total = decimal.Decimal(0)
    for entry in body.get("entries", []):
        amount = decimal.Decimal(entry["amount"])
        assert 0 < amount, "an amount is greater than zero"
        amount = {"CREDIT": amount, "DEBIT": -amount}[entry["direction"]]
        total += amount
        wallet = wallets[entry["walletId"]]
        wallet["balance"] += amount
        assert wallet["status"] == "ACTIVE", "money moves in a wallet that may not be used"
        assert wallet["balance"] == decimal.Decimal(entry["balanceAfter"]), "balanceAfter is not the fold"
        assert 0 <= wallet["balance"] or wallet["kind"] in ("ADJUSTMENTS", "BANK"), "below the floor"
        assert wallet["currency"] == (body.get("currency") or body["instruction"]["currency"]), "another currency"
    assert total == 0, "credits and debits differ"


def verify(lines):
    lines = enumerate((line.rstrip("\n") for line in lines), 1)
    number, position, commit, leaves, wallets, checkpoint = 1, 0, 0, [], {}, None
    try:
        ledger = json.loads(next(lines)[1])["ledger"]
        assert ledger["format"] == 1, "unknown format"
        head = genesis(ledger["id"])
        for number, line in lines:
            assert checkpoint is None, "something follows the checkpoint"
            row = members(line)
            value = lambda name: row[name][0]
            if "checkpoint" in row:
                checkpoint = value("checkpoint")
                assert checkpoint == {"position": position, "commit": commit, "chain": head.hex()}, "checkpoint differs"
                assert not leaves, "events without a commit"
            elif "eventId" in row:
                position += 1
                assert value("position") == position and value("commit") == commit + 1, "out of order"
                optional = lambda name: bytes.fromhex(value(name)) if name in row else b""
                own = leaf(value("aggregateType"), value("aggregateId"), value("sequence"), value("eventType"),
                           value("eventVersion"), micros(value("recordedAt")), uuid.UUID(value("commandId")[4:]).bytes,
                           optional("keyHash"), optional("requestHash"), row["payload"][1], row["metadata"][1])
                assert own.hex() == value("leafHash"), "leaf differs"
                assert event_id(own) == value("eventId"), "eventId differs"
                assert value("commandId")[:4] == "cmd_", "commandId without its prefix"
                leaves.append(own)
                kind, payload = value("eventType"), value("payload")
                if kind == "WalletOpened":
                    assert value("aggregateId") not in wallets, "opened twice"
                    wallets[value("aggregateId")] = {"balance": decimal.Decimal(0), "status": "ACTIVE",
                                                     "kind": payload[kind]["kind"], "currency": payload[kind]["currency"]}
                life = {"WalletFrozen": "FROZEN", "WalletUnfrozen": "ACTIVE", "WalletClosed": "CLOSED"}.get(kind)
                if life:
                    wallets[value("aggregateId")]["status"] = life
                fold(kind, payload, wallets)
            else:
                written = value("commit")
                commit += 1
                first, own = position - len(leaves) + 1, root(leaves)
                assert leaves and (commit, first, position) == (written["number"], written["first"], written["last"]), \
                    "the commit does not hold the events before it"
                head = chain(head, own, first, position)
                assert (own.hex(), head.hex()) == (written["root"], written["chain"]), "root or chain differs"
                leaves = []
        assert checkpoint, "the end is missing"
        totals = {}
        for wallet in wallets.values():
            totals[wallet["currency"]] = totals.get(wallet["currency"], 0) + wallet["balance"]
        assert not any(totals.values()), f"money was made or lost: {totals}"
    except (AssertionError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, StopIteration) as wrong:
        print(f"NOT SOUND: line {number}, after position {position}: {wrong!r}")
        return 1
    print(f"sound: ledger {ledger['id']}, position {position}, commit {commit}, chain {head.hex()}, {len(wallets)} wallets")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with open(sys.argv[1], encoding="utf-8", newline="\n") as export:
        sys.exit(verify(export))
