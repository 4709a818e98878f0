"""A device without an agent: its certificate, its key, and updates that are nobody's training."""

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding

from bench.fleet import TASK
from shared import identity, sealing, wire
from shared.messages import DeviceStatus, PlainBody, RoundOffer, UpdateContext, UpdateHead, UpdateMessage
from shared.opset import OPSET_VERSION
from shared.topics import Topics, update_name

CLIP = 10.0
TOPICS = Topics()


@dataclass(frozen=True)
class Made:
    """A sealed and signed update; `body` is what chunks are cut from, empty where it rides in the message."""

    topic: str
    message: bytes
    name: str
    body: memoryview


class Device:
    """A device of this bundle."""

    def __init__(self, bundle: Path) -> None:
        self.name = bundle.name
        self.key = identity.load_key(bundle / "device.key")
        self.certificate = identity.load_certificate(bundle / "device.crt").public_bytes(Encoding.DER)

    def status(self) -> bytes:
        """Ready to train the benchmark's task."""
        return wire.pack(
            DeviceStatus(
                v=2,
                session=bytes(8),
                online=True,
                version="bench",
                opsets=[OPSET_VERSION],
                eligible=True,
                obstacles=[],
                datasets=[TASK],
                sent=int(time.time()),
            )
        )

    def update(self, offer: RoundOffer, delta: memoryview, chunk: int = 0) -> Made:
        """An update for an open offer, made as trainer and agent make it; in chunks of so many bytes, 0 for none."""
        context = wire.pack(
            UpdateContext(
                v=1,
                task=offer.task,
                manifest=offer.manifest,
                release=offer.release,
                round=offer.round,
                device=self.name,
                report=os.urandom(16),
                mode="plain",
                k_min=0,
                codec="fp32",
                dimension=len(delta) // 4,
            )
        )
        header = PlainBody(examples=16, steps=1, metrics={"loss": 1.0}, holdout=4)
        encapsulation, body = sealing.seal(header, delta, offer.hpke_key, context)
        head = wire.pack(
            UpdateHead(
                v=2 if chunk else 1,
                context=context,
                encapsulation=encapsulation,
                size=len(body),
                sha256=hashlib.sha256(body).digest(),
                chunk_size=chunk,
                certificate=self.certificate,
                shares=[],
            )
        )
        signature = identity.sign_head(self.key, head)
        name = update_name(hashlib.sha256(head).digest())
        topic = TOPICS.head(0, self.name, name)
        if chunk:
            return Made(topic, wire.pack(UpdateMessage(v=2, head=head, sig=signature)), name, memoryview(body))
        return Made(
            topic, wire.pack(UpdateMessage(v=1, head=head, sig=signature, body=bytes(body))), name, memoryview(b"")
        )


def some_delta(parameters: int) -> memoryview:
    """A delta of norm about 1, as the codec encodes it."""
    return memoryview((np.random.default_rng(0).standard_normal(parameters, np.float32) / 1000).tobytes())
