"""Asks a server of `retention serve` for a text and for a chat, with OpenAI's client.

retention serve --model runs/demo &
python examples/ask_server.py http://127.0.0.1:8000
"""

import argparse
import os

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the server, as it says when it starts")
    parser.add_argument("--prompt", default="def ", help="default: %(default)r")
    parser.add_argument("--max-tokens", type=int, default=200, help="default: %(default)s")
    options = parser.parse_args()
    client = OpenAI(
        base_url=f"{options.url}/v1", api_key=os.environ.get("RETENTION_API_KEY", "none")
    )
    model = client.models.list().data[0].id

    completion = client.completions.create(
        model=model, prompt=options.prompt, max_tokens=options.max_tokens, temperature=0.6, seed=1
    )
    print(options.prompt + completion.choices[0].text)
    print(f"-- {completion.usage.completion_tokens} tokens")

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What does this function return?"}],
        max_tokens=options.max_tokens,
        temperature=0.6,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        else:
            print(f"\n-- {chunk.usage.completion_tokens} tokens")


if __name__ == "__main__":
    main()
