"""LlamaIndex, offline: a citation query engine whose sources are sieved by a draft model.

Pages of a handbook are found by BM25; the draft keeps what matters to the question; the target
answers from that. Every numbered source still leads to the characters of its file. For models of
the hub change TARGET and DRAFT; models of such a size also cite by number when they are asked to,
as they are without `response_synthesizer`.
"""

from pathlib import Path

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer

from draftsieve import SpecPC
from draftsieve.integrations.llama_index import DraftSieveLLM, DraftSievePostprocessor
from draftsieve.retrievers import Bm25Index, read_folder
from draftsieve.retrievers.llama_index import Bm25Retriever

TARGET = "builtin:target"  # from the hub: "Qwen/Qwen3-4B"
DRAFT = "builtin:draft"  # from the hub: "Qwen/Qwen3-0.6B"
HANDBOOK = Path(__file__).parent / "data" / "handbook"
QUESTIONS = [
    "What is marked on the pass of Haizek Pimemont?",
    "Until when may I stay in Shonuley House?",
    "Tell me the power of the Romamont 94.",
]
TEMPLATE = ChatPromptTemplate(  # the form in which the bundled target was trained
    [
        ChatMessage("Answer the question using only the passages.", role="system"),
        ChatMessage("{context_str}\n\nQuestion: {query_str}"),
    ]
)

llm = DraftSieveLLM(model=TARGET, max_tokens=24)
sieve = DraftSievePostprocessor(model=DRAFT, method=SpecPC.preset("2026-11", ratio=0.25))
retriever = Bm25Retriever(Bm25Index(read_folder(HANDBOOK)), similarity_top_k=4)
engine = CitationQueryEngine(
    retriever,
    llm=llm,
    node_postprocessors=[sieve],
    response_synthesizer=get_response_synthesizer(llm=llm, text_qa_template=TEMPLATE),
)
for question in QUESTIONS:
    response = engine.query(question)
    print(f"{question}\n  {response}")
    for number, source in enumerate(response.source_nodes, start=1):
        file, start = source.metadata["source"], source.metadata["start"]
        kept = source.metadata["draftsieve"]
        print(f"  [{number}] {file}: {kept['compressed_tokens']} of {kept['tokens']} tokens kept")
        text = (HANDBOOK / file).read_text(encoding="utf-8")[start:]
        for span in kept["spans"]:
            place = f"{start + span['start']}-{start + span['end']}"
            print(f"      {place:>9} {text[span['start'] : span['end']]!r}")
