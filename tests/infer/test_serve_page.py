"""The chat page in a browser: a question by keyboard, a stream, its stop, settings, thoughts, and a narrow screen."""

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ascendspeed_data.prompting import layout_named
from ascendspeed_infer.language_model import LanguageModel
from support.corpus import CHATML, make_chat_tokenizer
from support.models import save_hugging_face, tiny_config
from support.served import Running, running_server

PICTURES = os.environ.get("ASCENDSPEED_PICTURES")
"""Folder in which pictures of the page are left."""
ANSWERS = "document.querySelectorAll('article.assistant')"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_chat_tokenizer(path / "tokenizer")
    # Its prompts open the thoughts of the answer.
    tokenizer.chat_template = CHATML.replace("assistant\n", "assistant\n<think>")
    tokenizer.save_pretrained(path / "tokenizer")
    config = tiny_config(vocab_size=600, max_position_embeddings=2048)
    save_hugging_face(config, path / "tiny", tokenizer=path / "tokenizer")
    own = LanguageModel.from_pretrained(path / "tiny", device="cpu")
    with running_server(own, layout_named("tokenizer", own.tokenizer), cache_tokens=8192) as running:
        yield running
        running.wait_until_idle()


def test_the_page_asks_nobody_else(server: Running) -> None:
    answer = server.client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://""", answer.text)


def test_in_a_browser(server: Running, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install aiohttp")
    from support.browser import VARIABLE, browser_page, find_chromium

    chromium = find_chromium()
    if chromium is None:
        pytest.skip(f"there is no Chromium: install it, or name one in {VARIABLE}")
    pictures = Path(PICTURES) if PICTURES else tmp_path

    async def use() -> None:
        async with browser_page(chromium) as page:
            await page.resize(1000, 700)
            await page.open(server.url)
            await page.wait_for("document.getElementById('model').value === 'tiny'")
            # By keyboard alone: the message has the focus.
            assert await page.evaluate("document.activeElement.id") == "text"
            await page.evaluate("document.getElementById('max-tokens').value = 60")
            await page.evaluate("document.getElementById('seed').value = 4")
            await page.type("What was it <b>of</b>?")
            await page.press("Enter")
            await page.wait_for(f"{ANSWERS}[0]?.querySelector('small')")
            line = await page.evaluate(f"{ANSWERS}[0].querySelector('small').textContent")
            assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s", line)
            asked = await page.evaluate("document.querySelector('article.user').textContent")
            assert asked == "What was it <b>of</b>?"
            # What the model thinks is folded, and what is shown is what the server answers.
            want = server.client.post(
                "/v1/chat/completions",
                json={"messages": [{"role": "user", "content": asked}], "seed": 4, "max_tokens": 60,
                      "temperature": 1, "top_p": 1},
            ).json()["choices"][0]["message"]  # fmt: skip
            assert await page.evaluate(f"{ANSWERS}[0].querySelector('details').open") is False
            thought = await page.evaluate(f"{ANSWERS}[0].querySelector('details p').textContent")
            assert thought == want["reasoning_content"]
            assert (
                await page.evaluate(f"{ANSWERS}[0].querySelector(':scope > p').textContent")
                == want["content"]
            )
            await page.take_picture(pictures / "chat-wide.png")

            # A long answer is stopped by Escape, and its text ends on the server too.
            await page.evaluate("document.getElementById('max-tokens').value = 1500")
            await page.type("More")
            await page.press("Enter")
            await page.wait_for(f"{ANSWERS}[1]?.querySelector('details p')?.textContent.length > 20")
            assert await page.evaluate("document.getElementById('stop').disabled") is False
            await page.press("Escape")
            await page.wait_for(f"{ANSWERS}[1].querySelector('.error')?.textContent === 'stopped'")
            server.wait_until_idle(10)
            assert await page.evaluate("document.getElementById('stop').disabled") is True

            # An error of the server is shown.
            await page.evaluate("document.getElementById('temperature').value = 7")
            await page.type("Hot")
            await page.press("Enter")
            await page.wait_for(f"{ANSWERS}[2]?.querySelector('.error')")
            told = await page.evaluate(f"{ANSWERS}[2].querySelector('.error').textContent")
            assert told == "temperature: Input should be less than or equal to 2"

            # A narrow screen: nothing is wider than it, settings too.
            await page.resize(360, 640)
            assert await page.evaluate("document.documentElement.scrollWidth") <= 360
            await page.take_picture(pictures / "chat-narrow.png")
            await page.evaluate("document.getElementById('open-settings').click()")
            assert await page.evaluate("document.getElementById('settings').open")
            assert (
                await page.evaluate("document.getElementById('settings').getBoundingClientRect().right")
                <= 360
            )
            await page.take_picture(pictures / "chat-settings.png")
            await page.press("Escape")
            await page.wait_for("!document.getElementById('settings').open")
            await page.evaluate("document.getElementById('clear').click()")
            assert await page.evaluate("document.querySelectorAll('article').length") == 0
            # The refused request alone is told by the browser.
            assert all("400" in one for one in page.problems), json.dumps(page.problems)

    asyncio.run(use())
