"""LlamaIndex, offline: nodes found by BM25 are sieved by a draft model before a target answers.

For models of the hub change TARGET and DRAFT.
"""

from llama_index.core.schema import NodeWithScore, TextNode

from draftsieve import Engine, SpecPC
from draftsieve.integrations.llama_index import DraftSievePostprocessor
from draftsieve.retrievers import Bm25Index

TARGET = "builtin:target"  # from the hub: "Qwen/Qwen3-4B"
DRAFT = "builtin:draft"  # from the hub: "Qwen/Qwen3-0.6B"
TEXTS = [
    "Badge AK-731 was issued to Mira Tolen. She plays chess on Sundays. Her room is 214.",
    "Calls for Jonas Perrick go to 555-0173. The pass made out to him is marked D-4410.",
    "Project Halvora began on 3 May 2041. Its budget is 420 crowns.",
]
QUESTION = "Which badge was issued to Mira Tolen?"

engine = Engine.load(TARGET)
sieve = DraftSievePostprocessor(model=DRAFT, method=SpecPC(ratio=0.5, unit="sentence"))
nodes = [
    NodeWithScore(node=TextNode(text=passage.text, id_=passage.id), score=score)
    for passage, score in Bm25Index.from_texts(TEXTS).search(QUESTION, k=3)
]
kept = sieve.postprocess_nodes(nodes, query_str=QUESTION)
print(engine.answer(QUESTION, [node.text for node in kept]).text)
for node in kept:
    print(node.node_id, node.score, repr(node.text), node.metadata["draftsieve"]["spans"])
