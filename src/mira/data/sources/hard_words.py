"""Words of the hard suite's worlds."""

PEOPLE = ["Amara", "Bruno", "Celia", "Dario", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko", "Lena"]
LETTERS = "BCDFGHKLMNPRSTVWXZ"
FIGURES = ["baker", "captain", "doctor", "farmer", "gardener", "hunter", "painter", "queen", "sailor", "teacher"]
DEEDS = ["buys", "carries", "draws", "finds", "hides", "mends", "paints", "sells"]
THINGS = ["apple", "basket", "boat", "bridge", "candle", "drum", "kettle", "ladder", "mirror", "wheel"]
KINDS = ["bright", "broken", "cheap", "heavy", "new", "old", "quiet", "small"]
DEVICES = [
    "the printer", "the badge reader", "the guest wifi", "my headset", "the payroll form", "the shared drive",
    "the projector", "my laptop", "the booking page", "the phone line", "the mail server", "the coffee machine",
]  # fmt: skip
FAULTS = [
    "does not start", "stopped halfway", "shows an error", "is very slow", "asks for a password",
    "makes a strange noise",
]  # fmt: skip
TIMES = [
    "since this morning", "again today", "for a week", "since the update", "right before a meeting", "now and then",
]  # fmt: skip
TEAMS = ["hardware", "network", "accounts", "facilities", "finance"]
TERMS = ["within the hour", "by noon", "by tonight", "this week"]
ARTICLES = ["scarf", "coat", "glove", "hat", "belt", "bag", "blanket", "curtain", "cushion", "towel", "apron", "shirt"]
COLOURS = ["red", "blue", "green", "grey", "black", "white", "yellow", "brown"]
MATERIALS = ["wool", "linen", "leather", "cotton", "silk", "felt", "velvet", "canvas"]
SIZES = ["small", "medium", "large", "huge"]
WINDS = [
    "calm", "hardly a breath", "a light breeze", "fresh air", "lively gusts", "a stiff wind", "blustery",
    "half a gale", "a full storm",
]  # fmt: skip
RAINS = [
    "dry", "not a drop", "a little damp", "a few showers", "steady rain", "wet through", "a downpour",
    "floods in places",
]  # fmt: skip
WARMTHS = ["bitter frost", "freezing", "chilly", "cool", "mild", "pleasant", "warm", "hot", "scorching"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
FACTS = {
    "room": [f"room {number}" for number in range(104, 392, 24)],
    "project": [
        "the harbour", "the museum", "the tram", "the archive", "the bridge", "the market", "the clinic",
        "the school", "the park", "the tower", "the library", "the theatre",
    ],
    "day": [f"{half} {day}" for day in DAYS[:6] for half in ("early", "late")],
    "drink": [
        "black tea", "green tea", "cocoa", "cider", "lemonade", "tonic", "espresso", "milk", "mint tea",
        "apple juice", "soda", "malt beer",
    ],
}  # fmt: skip
SAID = {"room": "sits in {}", "project": "works on {}", "day": "is off on {}", "drink": "drinks {}"}
PURPOSES = {
    "ask": ["Would you kindly see to {}", "May we trouble you for {}", "Please let us have {}"],
    "thank": ["We are most grateful for {}", "Many thanks indeed for {}", "How good of you to send {}"],
    "remind": ["We still look forward to {}", "Allow us to recall {}", "It may have slipped your mind: {}"],
    "refuse": ["To our regret we cannot accept {}", "Sadly there is no room for {}", "We must say no to {}"],
    "confirm": ["All is settled about {}", "We have taken note of {}", "You may count on {}"],
    "offer": ["It would be our pleasure to provide {}", "We gladly propose {}", "Might we interest you in {}"],
}
READERS = {
    "client": ["Esteemed {}", "Dear {}", "To {}, with respect"],
    "colleague": ["Hello {}", "Good day, {}", "{}, a word"],
    "supplier": ["For the attention of {}", "Greetings, {}", "Dear partner {}"],
    "neighbour": ["Dear friend {}", "{} next door", "Good neighbour {}"],
}
CLOSINGS = ["Ever yours", "With kind wishes", "Faithfully", "Until soon", "In haste", "With thanks in advance"]
MATTERS = [
    "the invoice", "the keys", "the new contract", "the parcel", "the second sample", "the old lease", "the report",
    "the tickets",
]  # fmt: skip
DATES = ["Monday noon", "Friday", "the first of May", "next week", "Easter", "the end of the month"]
