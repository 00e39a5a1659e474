"""LlamaIndex with a remote target: the draft sieves here, an OpenAI-compatible server answers.

Any server will do (vLLM, SGLang, a hosted one): set OPENAI_BASE_URL and OPENAI_API_KEY. For models
of the hub change TARGET (or set MODEL) to the name of the served model, and DRAFT.
"""

import os

from llama_index.core import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.llms.openai_like import OpenAILike

from draftsieve import SpecPC
from draftsieve.retrievers import Bm25Index
from draftsieve.retrievers.llama_index import Bm25Retriever, SievedRetriever

TARGET = os.environ.get("MODEL", "target")  # served from the hub: "Qwen/Qwen3-4B"
DRAFT = "builtin:draft"  # from the hub: "Qwen/Qwen3-0.6B"
TEXTS = [
    "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214.",
    "Calls for Jonas Perrick go to 555-0173. The pass made out to him is marked D-4410.",
    "Project Halvora began on 3 May 2041. Its budget is 420 crowns.",
]
QUESTION = "Which badge was issued to Mira Tolen?"

llm = OpenAILike(
    api_base=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
    model=TARGET,
    context_window=2304,
    is_chat_model=True,
    temperature=0,
    max_tokens=24,
)
base = Bm25Retriever(Bm25Index.from_texts(TEXTS), similarity_top_k=3)
sieved = SievedRetriever(base, k=2, n=2, method=SpecPC(ratio=0.5, unit="sentence"), model=DRAFT)
for retriever in (base, sieved):
    engine = RetrieverQueryEngine.from_args(
        retriever,
        llm=llm,
        text_qa_template=PromptTemplate("[1] {context_str}\n\nQuestion: {query_str}"),
    )
    response = engine.query(QUESTION)
    characters = sum(len(node.text) for node in response.source_nodes)
    print(f"{characters} characters read by the server: {response}")
    for node in response.source_nodes:
        print(" ", node.node_id, repr(node.text))
