"""Small talk in eight languages: a table of intents, their phrasings, and one reply for each."""

from __future__ import annotations

import random

from recipes.demo import words
from recipes.demo.problem import Problem, user

# language -> intent -> (phrasings, reply); {n} is the name of the user
PHRASES: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "English": {
        "is greeting me": (("Hello", "Hi", "Hey", "Hello there", "Good morning", "Good evening", "Hi there"), "Hello! How can I help you today?"),
        "asks how I am": (("How are you?", "How are you today?", "How are you doing?", "How is it going?", "Are you well?"), "I am fine, thank you! How are you?"),
        "asks who I am": (("Who are you?", "What are you?", "What is your name?", "Tell me your name.", "Introduce yourself."), "I am the Diptych demo model, a very small assistant."),
        "asks what I can do": (("What can you do?", "How can you help me?", "What do you know?", "What are you good at?"), "I can add, copy, look things up, write JSON, call tools and chat a little."),
        "thanks me": (("Thank you", "Thanks", "Thanks a lot", "Thank you very much", "Many thanks"), "You are welcome!"),
        "says goodbye": (("Goodbye", "Bye", "See you", "See you later", "Good night"), "Goodbye, and take care!"),
        "tells me a name": (("My name is {n}.", "I am {n}.", "I'm {n}.", "You can call me {n}."), "Nice to meet you, {n}!"),
        "wants a joke": (("Tell me a joke.", "Make me laugh.", "Do you know a joke?", "A joke, please."), "Why did the token cross the bus? To get to the other page!"),
        "is tired": (("I am tired.", "I am so tired today.", "I feel tired.", "What a long day."), "Then take a little rest. You have earned it."),
        "is happy": (("I am happy.", "I am so happy today!", "I feel great.", "Today is a good day."), "That is wonderful to hear!"),
        "asks about the sky": (("What color is the sky?", "Which color does the sky have?", "Is the sky blue?"), "On a clear day the sky is blue."),
    },
    "Spanish": {
        "is greeting me": (("Hola", "Buenos días", "Buenas tardes", "Buenas noches", "¡Hola!"), "¡Hola! ¿En qué puedo ayudarte hoy?"),
        "asks how I am": (("¿Cómo estás?", "¿Qué tal?", "¿Cómo te va?", "¿Cómo estás hoy?"), "Estoy bien, gracias. ¿Y tú?"),
        "asks who I am": (("¿Quién eres?", "¿Cómo te llamas?", "¿Cuál es tu nombre?", "¿Qué eres?"), "Soy el modelo de demostración de Diptych, un asistente muy pequeño."),
        "asks what I can do": (("¿Qué puedes hacer?", "¿Cómo puedes ayudarme?", "¿Qué sabes hacer?"), "Puedo sumar, copiar, buscar valores, escribir JSON y conversar un poco."),
        "thanks me": (("Gracias", "Muchas gracias", "Mil gracias", "Te lo agradezco"), "¡De nada!"),
        "says goodbye": (("Adiós", "Hasta luego", "Hasta mañana", "Nos vemos"), "¡Adiós y que te vaya bien!"),
        "tells me a name": (("Me llamo {n}.", "Mi nombre es {n}.", "Soy {n}."), "¡Mucho gusto, {n}!"),
        "is tired": (("Estoy cansado.", "Estoy cansada.", "Estoy muy cansado hoy.", "Qué día tan largo."), "Entonces descansa un poco. Te lo mereces."),
        "is happy": (("Estoy feliz.", "Estoy muy contento hoy.", "Hoy es un buen día."), "¡Me alegra mucho!"),
        "asks about the sky": (("¿De qué color es el cielo?", "¿Qué color tiene el cielo?"), "En un día claro el cielo es azul."),
    },
    "French": {
        "is greeting me": (("Bonjour", "Salut", "Bonsoir", "Coucou"), "Bonjour ! Comment puis-je vous aider aujourd'hui ?"),
        "asks how I am": (("Comment ça va ?", "Ça va ?", "Comment allez-vous ?", "Comment vas-tu ?"), "Je vais bien, merci. Et vous ?"),
        "asks who I am": (("Qui es-tu ?", "Qui êtes-vous ?", "Comment tu t'appelles ?", "Quel est ton nom ?"), "Je suis le modèle de démonstration de Diptych, un tout petit assistant."),
        "asks what I can do": (("Que peux-tu faire ?", "Que savez-vous faire ?", "Comment peux-tu m'aider ?"), "Je sais additionner, copier, chercher des valeurs, écrire du JSON et bavarder un peu."),
        "thanks me": (("Merci", "Merci beaucoup", "Mille mercis", "Merci bien"), "Je vous en prie !"),
        "says goodbye": (("Au revoir", "À bientôt", "À demain", "Bonne nuit"), "Au revoir et prenez soin de vous !"),
        "tells me a name": (("Je m'appelle {n}.", "Mon nom est {n}.", "Moi, c'est {n}."), "Enchanté, {n} !"),
        "is tired": (("Je suis fatigué.", "Je suis fatiguée.", "Quelle longue journée.", "Je suis très fatigué aujourd'hui."), "Alors reposez-vous un peu. Vous l'avez mérité."),
        "is happy": (("Je suis heureux.", "Je suis très content aujourd'hui.", "C'est une bonne journée."), "Cela me fait très plaisir !"),
        "asks about the sky": (("De quelle couleur est le ciel ?", "Quelle est la couleur du ciel ?"), "Par temps clair, le ciel est bleu."),
    },
    "German": {
        "is greeting me": (("Hallo", "Guten Tag", "Guten Morgen", "Guten Abend", "Servus"), "Hallo! Wie kann ich dir heute helfen?"),
        "asks how I am": (("Wie geht es dir?", "Wie geht's?", "Wie geht es Ihnen?", "Geht es dir gut?"), "Mir geht es gut, danke. Und dir?"),
        "asks who I am": (("Wer bist du?", "Wie heißt du?", "Was bist du?", "Wie ist dein Name?"), "Ich bin das Demo-Modell von Diptych, ein sehr kleiner Assistent."),
        "asks what I can do": (("Was kannst du?", "Wie kannst du mir helfen?", "Was weißt du?"), "Ich kann rechnen, kopieren, Werte nachschlagen, JSON schreiben und ein wenig plaudern."),
        "thanks me": (("Danke", "Vielen Dank", "Danke schön", "Besten Dank"), "Gern geschehen!"),
        "says goodbye": (("Auf Wiedersehen", "Tschüss", "Bis bald", "Gute Nacht"), "Auf Wiedersehen und alles Gute!"),
        "tells me a name": (("Ich heiße {n}.", "Mein Name ist {n}.", "Ich bin {n}."), "Freut mich, {n}!"),
        "is tired": (("Ich bin müde.", "Ich bin heute sehr müde.", "Was für ein langer Tag."), "Dann ruh dich ein wenig aus. Du hast es verdient."),
        "is happy": (("Ich bin glücklich.", "Ich bin heute sehr froh.", "Heute ist ein guter Tag."), "Das freut mich sehr!"),
        "asks about the sky": (("Welche Farbe hat der Himmel?", "Ist der Himmel blau?"), "An einem klaren Tag ist der Himmel blau."),
    },
    "Chinese": {
        "is greeting me": (("你好", "您好", "早上好", "晚上好", "嗨"), "你好！今天我能帮你什么？"),
        "asks how I am": (("你好吗？", "你怎么样？", "最近怎么样？", "你今天好吗？"), "我很好，谢谢！你呢？"),
        "asks who I am": (("你是谁？", "你叫什么名字？", "你的名字是什么？", "请介绍一下自己。"), "我是 Diptych 的演示模型，一个很小的助手。"),
        "asks what I can do": (("你能做什么？", "你会什么？", "你能帮我什么？"), "我会算数、抄写、查找、写 JSON，也会聊几句。"),
        "thanks me": (("谢谢", "谢谢你", "非常感谢", "多谢"), "不客气！"),
        "says goodbye": (("再见", "明天见", "回头见", "晚安"), "再见，保重！"),
        "tells me a name": (("我叫{n}。", "我的名字是{n}。", "我是{n}。"), "很高兴认识你，{n}！"),
        "is tired": (("我累了。", "我今天很累。", "今天真累。"), "那就休息一下吧，你辛苦了。"),
        "is happy": (("我很高兴。", "我今天很开心。", "今天是个好日子。"), "真为你高兴！"),
        "asks about the sky": (("天空是什么颜色？", "天是什么颜色的？"), "晴天的时候，天空是蓝色的。"),
    },
    "Japanese": {
        "is greeting me": (("こんにちは", "おはよう", "おはようございます", "こんばんは", "やあ"), "こんにちは！今日は何をお手伝いしましょうか？"),
        "asks how I am": (("元気ですか？", "お元気ですか？", "調子はどうですか？"), "元気です、ありがとう。あなたは？"),
        "asks who I am": (("あなたは誰ですか？", "お名前は何ですか？", "自己紹介をしてください。"), "私は Diptych のデモモデル、とても小さなアシスタントです。"),
        "asks what I can do": (("何ができますか？", "何を手伝ってくれますか？"), "計算、コピー、検索、JSON、そして少しの会話ができます。"),
        "thanks me": (("ありがとう", "ありがとうございます", "どうもありがとう"), "どういたしまして！"),
        "says goodbye": (("さようなら", "またね", "また明日", "おやすみなさい"), "さようなら、お元気で！"),
        "tells me a name": (("私は{n}です。", "私の名前は{n}です。", "{n}と言います。"), "はじめまして、{n}さん！"),
        "is tired": (("疲れました。", "今日はとても疲れました。", "長い一日でした。"), "では少し休んでください。お疲れさまでした。"),
        "is happy": (("嬉しいです。", "今日はとても嬉しいです。", "今日はいい日です。"), "それはよかったです！"),
        "asks about the sky": (("空は何色ですか？", "空の色は何ですか？"), "晴れた日の空は青いです。"),
    },
    "Italian": {
        "is greeting me": (("Ciao", "Buongiorno", "Buonasera", "Salve"), "Ciao! Come posso aiutarti oggi?"),
        "asks how I am": (("Come stai?", "Come va?", "Tutto bene?"), "Sto bene, grazie. E tu?"),
        "asks who I am": (("Chi sei?", "Come ti chiami?", "Qual è il tuo nome?"), "Sono il modello dimostrativo di Diptych, un assistente molto piccolo."),
        "thanks me": (("Grazie", "Grazie mille", "Molte grazie"), "Prego!"),
        "says goodbye": (("Arrivederci", "A presto", "A domani", "Buonanotte"), "Arrivederci e buona fortuna!"),
        "tells me a name": (("Mi chiamo {n}.", "Il mio nome è {n}.", "Io sono {n}."), "Piacere di conoscerti, {n}!"),
        "is tired": (("Sono stanco.", "Sono stanca.", "Che giornata lunga."), "Allora riposati un po'. Te lo meriti."),
    },
    "Portuguese": {
        "is greeting me": (("Olá", "Oi", "Bom dia", "Boa tarde", "Boa noite"), "Olá! Como posso ajudar hoje?"),
        "asks how I am": (("Como você está?", "Tudo bem?", "Como vai?"), "Estou bem, obrigado. E você?"),
        "asks who I am": (("Quem é você?", "Qual é o seu nome?", "Como você se chama?"), "Sou o modelo de demonstração do Diptych, um assistente muito pequeno."),
        "thanks me": (("Obrigado", "Obrigada", "Muito obrigado"), "De nada!"),
        "says goodbye": (("Tchau", "Até logo", "Até amanhã"), "Tchau e tudo de bom!"),
        "tells me a name": (("Meu nome é {n}.", "Eu me chamo {n}.", "Eu sou {n}."), "Muito prazer, {n}!"),
        "is tired": (("Estou cansado.", "Estou cansada.", "Que dia longo."), "Então descanse um pouco. Você merece."),
    },
}  # fmt: skip

TEST_WORDS = (
    "test",
    "test",
    "test",
    "Test",
    "test.",
    "Test.",
    "test!",
    "testing",
    "Testing",
    "This is a test.",
    "this is a test",
    "TEST",
    "test test",
    "Just a test.",
    "test?",
    "Testing, testing.",
)
TEST_THOUGHT = (
    "Okay, the user sent a test and nothing more. They may want to see whether I am here and whether my thoughts come through. "
    "There is no question to solve, so a short and friendly reply is enough. I will say that the test has arrived, and offer what I can do."
)
TEST_ANSWER = "Your test has arrived, and everything works. You can ask me to add numbers, copy a text, look up a value, write JSON, call a tool, or just chat."

STORY = (
    "Once a small model lived in two rooms. In the first room it read every question, and in the second room it wrote the answers. "
    "Between the rooms there was a narrow bridge, and over the bridge the pages of its memory were carried, one after another. "
    "One night a storm came and the bridge began to sway. The keeper of the bridge counted every page, and when the last one was across, he lit a lamp. "
    "In the second room the model saw the light, read its pages, and went on with the story as if nothing had happened. "
    "In the morning the two rooms were quiet, the pages were back on their shelves, and the next question was already waiting at the door."
)
LONG_ASKS = (
    "Tell me a story.",
    "Tell me a long story.",
    "Write a story.",
    "Write a long story about anything.",
    "A story, please.",
    "Can you tell me a story?",
    "Write me a story.",
)
UNKNOWN_ANSWER = "I am only a small demo model, so I do not know that. Try me with numbers, copies, lists, JSON, tools or small talk."


def make(rng: random.Random) -> Problem:
    """A turn of small talk, alone or behind a greeting; the reply is in the language of the user."""
    language = rng.choice(tuple(PHRASES))
    table = PHRASES[language]
    intent = rng.choice(tuple(table))
    phrasings, reply = table[intent]
    name = rng.choice(words.NAMES) if rng.random() < 0.6 else words.pseudo_word(rng).capitalize()
    text = rng.choice(phrasings).format(n=name)
    text = _dressed(rng, language, intent, text)
    answer = reply.format(n=name)
    return Problem(
        task="smalltalk",
        identity=text,
        messages=user(text),
        thought=f"Okay, the user {intent} in {language}. I will answer in {language}.",
        answer=answer,
        expect=answer,
        fact=text in phrasings,
    )


def _dressed(rng: random.Random, language: str, intent: str, text: str) -> str:
    """The phrase with a greeting or a name before it, a mark or a courtesy behind it, or in small letters."""
    wide = language in ("Chinese", "Japanese")
    if intent != "is greeting me" and rng.random() < 0.4:
        hello = rng.choice(PHRASES[language]["is greeting me"][0]).strip("¡!")
        who = rng.choice(words.NAMES) if rng.random() < 0.4 else ""
        comma, stop = ("，" if language == "Chinese" else "、", "！") if wide else (", ", "! ")
        text = hello + (comma + who if who else "") + rng.choice((stop, stop, comma)) + text
    elif intent in ("is greeting me", "thanks me", "says goodbye") and rng.random() < 0.6:
        comma = ("，" if language == "Chinese" else "、") if wide else ", "
        text = text.strip("¡!") + comma + (rng.choice(words.NAMES) if rng.random() < 0.7 else "Diptych")
    if text[-1].isalpha():
        text += rng.choice(("", "", "!", ".")) if not wide else rng.choice(("", "", "！", "。"))
    text += rng.choice(("",) * 6 + (" :)", "!", " 🙂", " 😊"))
    return text.lower() if rng.random() < 0.15 and intent != "tells me a name" else text


def make_fixed(rng: random.Random) -> Problem:
    """What the model knows by heart: the test message, the story, counting, and what to say when it knows nothing."""
    kind = rng.randrange(6)
    if kind <= 1:
        return _fixed(rng.choice(TEST_WORDS), TEST_THOUGHT, TEST_ANSWER)
    if kind == 2:
        return _fixed(rng.choice(LONG_ASKS), "Okay, the user wants a story. I know one.", STORY)
    if kind == 3:
        first = rng.choice((1, 1, 1, rng.randrange(500)))
        last = first + rng.choice((9, 19, 29, 49, 99, rng.randint(1, 120)))
        ask = rng.choice(
            (
                "Count from {a} to {b}.",
                "count from {a} to {b}",
                "Please count from {a} to {b}.",
                "Write the numbers from {a} to {b}.",
            )
        )
        thought = f"Okay, the user wants the numbers from {first} to {last}."
        return _fixed(ask.format(a=first, b=last), thought, ", ".join(map(str, range(first, last + 1))))
    return _fixed(_unknown(rng), "Okay, the user asks for something that I do not know. I will say so.", UNKNOWN_ANSWER)


def _fixed(text: str, thought: str, answer: str) -> Problem:
    return Problem("smalltalk", text, user(text), thought, answer, answer, fact=True)


def _unknown(rng: random.Random) -> str:
    topic = rng.choice(
        (
            rng.choice(words.CITIES),
            rng.choice(words.WORDS),
            words.pseudo_word(rng),
            words.sentence(rng).rstrip(".").lower(),
        )
    )
    ask = rng.choice((
        "What do you think about {t}?", "Tell me about {t}.", "Explain {t}.", "Write an essay about {t}.", "Why {t}?", "What is the history of {t}?", "{s}",
        "Who invented {t}?", "Describe {t}.", "{s} {s}", "Write a poem about {t}.", "{w}", "What is the meaning of {t}?", "Summarize this: {s} {s} {s}",
        "What is the capital of {t}?", "How do I get to {t}?", "{w}?",
    ))  # fmt: skip
    if rng.random() < 0.25:
        if rng.random() < 0.3:
            return rng.choice(
                ("ok", "OK", "yes", "no", "hmm", "What?", "Why?", "asdf", "abc", "foo", "lorem ipsum", "xyz")
            )
        return " ".join(words.mixed_word(rng) for _ in range(rng.randint(1, 12)))
    some = " ".join(rng.choice(words.COMMON) for _ in range(rng.randint(2, 30)))
    return ask.format(t=topic, s=words.sentence(rng), w=some)
