"""The page of `peft-edit ui` as a Space: `MODEL` and `ADAPTERS` are variables of its settings.

Run here: MODEL=HuggingFaceTB/SmolLM2-135M-Instruct ADAPTERS=user/adapter python app.py
"""

import os
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_edit.chatting import Chat, ChatModels, Sampling
from peft_edit.chatting.page import ChatPage, launch
from peft_edit.chatting.serving import ServingOptions


name = os.environ.get("MODEL")  # id on the Hub, or folder
if not name:
    sys.exit("set the variable MODEL to the base model's id on the Hub")
adapters = os.environ.get("ADAPTERS", "").split()  # ids on the Hub, with a space between two; the first edits at first

base = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto").eval()
chat = Chat(ChatModels(base, AutoTokenizer.from_pretrained(name)))
page = ChatPage(chat, adapters, Sampling(max_new_tokens=256)).build()

if __name__ == "__main__":
    # A Space is reached through its own server, which tells where to listen.
    where = {"host": os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), "port": int(os.environ.get("PORT", 7860))}
    print("Page:", launch(page, ServingOptions(**where)), flush=True)
    page.block_thread()
