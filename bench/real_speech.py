"""Speech for Whisper: a text spoken by eSpeak NG, from the package espeakng-loader, and the log-mel
features of a waveform."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from real_models import Missing, package_folder

RATE = 16000  # what Whisper hears, in samples per second


@cache
def _espeak() -> tuple[ctypes.CDLL, int]:
    """(the library, its samples per second)."""
    folder = package_folder("espeakng_loader", "0.2.4")
    library = ctypes.CDLL(str(folder / "libespeak-ng.so"))
    synchronous = 2
    rate = library.espeak_Initialize(synchronous, 0, str(folder).encode(), 0)
    if rate <= 0 or library.espeak_SetVoiceByName(b"en-us"):
        raise Missing(f"{folder}: eSpeak NG finds neither its data nor the voice en-us")
    library.espeak_SetParameter(1, 140, 0)  # words per minute
    return library, rate


def speak(text: str) -> torch.Tensor:
    """text in English -> [samples] float32 within -1 .. 1, at RATE. The same text gives the same
    samples. Raises Missing if espeakng-loader is not here."""
    library, rate = _espeak()
    heard: list[int] = []
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
    )

    @kind
    def take(wave, count, events):  # type: ignore[no-untyped-def]
        if wave and count > 0:
            heard.extend(wave[:count])
        return 0

    library.espeak_SetSynthCallback(take)
    spoken = text.encode() + b"\0"
    utf8, position = 1, 0
    library.espeak_Synth(spoken, len(spoken), 0, position, 0, utf8, None, None)
    library.espeak_Synchronize()
    wave = torch.tensor(heard, dtype=torch.float32) / 32768
    count = round(len(wave) * RATE / rate)
    return torch.nn.functional.interpolate(
        wave[None, None], size=count, mode="linear", align_corners=False
    )[0, 0]


def features(wave: torch.Tensor) -> torch.Tensor:
    """wave [samples] at RATE, up to 30 seconds -> [1, 80, 3000] float32, as Whisper was trained
    on."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor()
    return extract(wave.numpy(), sampling_rate=RATE, return_tensors="pt").input_features
