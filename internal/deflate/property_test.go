// This file checks the invariants of the package comment on random offers and
// answers, and holds the fuzz test. The client and the backends here are
// written down from RFC 7692 a second time, and share no code with the package.

package deflate

import (
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestToldIsAcceptableAndIndependentOfTheBackend(t *testing.T) {
	rng := rand.New(rand.NewPCG(7692, 6455))
	var agreed, refused, redialed int
	for range 2500 {
		offer := randomElements(rng, 1+rng.IntN(3), randomOfferParam)
		mode := On
		if rng.IntN(4) == 0 {
			mode = Safe
		}
		n := Negotiate([]string{strings.Join(offer, ", ")}, mode)
		checkSent(t, offer, n.Offer())

		// What the client was told, by the two facts it may depend on.
		told := map[bool]string{}
		for range 6 {
			answer := randomAnswer(rng, n.Offer())
			a, err := n.Accept([]string{answer})

			// Accepted if and only if it is valid for what was sent.
			if valid := answer == "" || acceptable(n.Offer(), answer); valid != (err == nil) {
				t.Fatalf("offered %q, answered %q: got error %v, want valid to be %t", n.Offer(), answer, err, valid)
			}
			if err != nil {
				refused++
				continue
			}
			if a.Compressed() != (answer != "") {
				t.Fatalf("answered %q, told %q", answer, a.Answer())
			}
			if !a.Compressed() {
				checkRedial(t, rng, a, "")
				continue
			}

			agreed++
			if !acceptable(strings.Join(offer, ", "), a.Answer()) {
				t.Fatalf("client offered %q, must not be told %q", offer, a.Answer())
			}
			if n := strings.Count(a.Answer(), "client_no_context_takeover"); n != 1 {
				t.Fatalf("told %q: client_no_context_takeover is there %d times", a.Answer(), n)
			}
			_, hasFresh := paramsOf(answer)["server_no_context_takeover"]
			if before, ok := told[hasFresh]; ok && before != a.Answer() {
				t.Fatalf("client offered %q, told %q by one backend and %q by another", offer, before, a.Answer())
			}
			told[hasFresh] = a.Answer()
			if !keeps(answer, a.Answer()) {
				t.Fatalf("client told %q, backend answered %q", a.Answer(), answer)
			}
			redialed += checkRedial(t, rng, a, a.Answer())
		}
	}
	if agreed < 1000 || refused < 1000 || redialed < 1000 {
		t.Fatalf("too little was tested: %d agreed, %d refused, %d redialed", agreed, refused, redialed)
	}
}

// checkRedial has the connection go to another backend and reports how often it
// was taken there.
func checkRedial(t *testing.T, rng *rand.Rand, told Agreement, answerToClient string) (taken int) {
	t.Helper()
	n := told.Redial()
	if n.Offer() != answerToClient {
		t.Fatalf("client told %q, offered at re-dial %q", answerToClient, n.Offer())
	}
	for range 3 {
		answer := randomAnswer(rng, n.Offer())
		later, err := n.Accept([]string{answer})
		fits := (answer == "" || acceptable(n.Offer(), answer)) && keeps(answer, answerToClient)
		if fits != (err == nil) {
			t.Fatalf("client told %q, later backend answered %q: got error %v, want fit %t", answerToClient, answer, err, fits)
		}
		if err != nil {
			continue
		}
		taken++
		if err := told.Agrees(later); err != nil {
			t.Fatalf("client told %q, later backend answered %q: %v", answerToClient, answer, err)
		}
	}
	return taken
}

// checkSent checks the offer to the backend against that of the client.
func checkSent(t *testing.T, client []string, sent string) {
	t.Helper()
	if strings.Contains(sent, "client_max_window_bits") {
		t.Fatalf("client_max_window_bits in %q", sent)
	}
	for _, e := range splitElements(sent) {
		p := paramsOf(e)
		if _, ok := p["client_no_context_takeover"]; !ok {
			t.Fatalf("no client_no_context_takeover in %q", e)
		}
		// It differs from one of the client's in the client's side only.
		if !slices.ContainsFunc(client, func(c string) bool {
			q := paramsOf(c)
			_, fp := p["server_no_context_takeover"]
			_, fq := q["server_no_context_takeover"]
			return validOffer(c) && fp == fq && p["server_max_window_bits"] == q["server_max_window_bits"]
		}) {
			t.Fatalf("client offered %q, which has no %q", client, e)
		}
	}
}

// acceptable tells whether a client has to accept the answer to its offer:
// whether there is an element in it that the answer can be for.
func acceptable(offer, answer string) bool {
	elements := splitElements(answer)
	if len(elements) != 1 || !wellFormed(elements[0]) {
		return false
	}
	a := paramsOf(elements[0])
	return slices.ContainsFunc(splitElements(offer), func(e string) bool {
		if !validOffer(e) {
			return false
		}
		o := paramsOf(e)
		if _, ok := a["client_max_window_bits"]; ok {
			if _, ok := o["client_max_window_bits"]; !ok {
				return false
			}
		}
		_, asked := o["server_no_context_takeover"]
		_, given := a["server_no_context_takeover"]
		if asked && !given {
			return false
		}
		limit, limited := o["server_max_window_bits"]
		window, ok := a["server_max_window_bits"]
		return !limited || ok && number(window) <= number(limit)
	})
}

// keeps tells whether a backend that answered so keeps what the client was told.
func keeps(answer, told string) bool {
	if told == "" || answer == "" {
		return told == answer
	}
	a, p := paramsOf(answer), paramsOf(told)
	if _, promised := p["server_no_context_takeover"]; promised {
		if _, ok := a["server_no_context_takeover"]; !ok {
			return false
		}
	}
	window := 15
	if w, ok := a["server_max_window_bits"]; ok {
		window = number(w)
	}
	limit, limited := p["server_max_window_bits"]
	return !limited || window <= number(limit)
}

// wellFormed checks an element with client_max_window_bits as in an answer, where its
// value is not optional.
func wellFormed(e string) bool {
	parts := strings.Split(e, "; ")
	seen := map[string]bool{}
	for _, part := range parts[1:] {
		name, value, hasValue := strings.Cut(part, "=")
		if seen[name] {
			return false
		}
		seen[name] = true
		switch name {
		case "server_no_context_takeover", "client_no_context_takeover":
			if hasValue {
				return false
			}
		case "server_max_window_bits", "client_max_window_bits":
			if !slices.Contains([]string{"8", "9", "10", "11", "12", "13", "14", "15"}, value) {
				return false
			}
		default:
			return false
		}
	}
	return parts[0] == "permessage-deflate"
}

func validOffer(e string) bool {
	parts := strings.Split(e, "; ")
	for i, part := range parts {
		if part == "client_max_window_bits" {
			parts[i] += "=15"
		}
	}
	return wellFormed(strings.Join(parts, "; "))
}

func splitElements(header string) []string {
	if header == "" {
		return nil
	}
	return strings.Split(header, ", ")
}

func paramsOf(e string) map[string]string {
	params := map[string]string{}
	for _, part := range strings.Split(e, "; ")[1:] {
		name, value, _ := strings.Cut(part, "=")
		params[name] = value
	}
	return params
}

func number(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		panic(err) // checked by wellFormed
	}
	return n
}

// randomAnswer is mostly a good answer to one of the elements, with chances to
// be spoiled, sometimes random, sometimes none.
func randomAnswer(rng *rand.Rand, offer string) string {
	elements := splitElements(offer)
	if len(elements) == 0 || rng.IntN(4) == 0 {
		if rng.IntN(2) == 0 {
			return ""
		}
		return strings.Join(randomElements(rng, 1+rng.IntN(8)/7, randomAnswerParam), ", ")
	}
	answer := []string{"permessage-deflate"}
	for _, part := range strings.Split(elements[rng.IntN(len(elements))], "; ")[1:] {
		name, value, _ := strings.Cut(part, "=")
		switch {
		case name == "client_no_context_takeover" && rng.IntN(2) == 0:
		case name == "server_max_window_bits":
			answer = append(answer, name+"="+strconv.Itoa(8+rng.IntN(number(value)-7)))
		default:
			answer = append(answer, part)
		}
	}
	if rng.IntN(3) == 0 {
		answer = append(answer, randomAnswerParam(rng))
	}
	return strings.Join(answer, "; ")
}

func randomElements(rng *rand.Rand, n int, param func(*rand.Rand) string) []string {
	var elements []string
	for range n {
		parts := []string{"permessage-deflate"}
		if rng.IntN(20) == 0 {
			parts[0] = "x-other"
		}
		for range rng.IntN(4) {
			parts = append(parts, param(rng))
		}
		elements = append(elements, strings.Join(parts, "; "))
	}
	return elements
}

func randomOfferParam(rng *rand.Rand) string {
	if rng.IntN(5) == 0 {
		return "client_max_window_bits"
	}
	return randomAnswerParam(rng)
}

func randomAnswerParam(rng *rand.Rand) string {
	switch rng.IntN(40) {
	case 0:
		return "unknown"
	case 1:
		return "server_max_window_bits=" + []string{"7", "08", "16", "x"}[rng.IntN(4)]
	case 2:
		return "server_no_context_takeover=1"
	case 3, 4, 5:
		return "client_max_window_bits=" + strconv.Itoa(8+rng.IntN(8))
	}
	switch rng.IntN(3) {
	case 0:
		return "client_no_context_takeover"
	case 1:
		return "server_no_context_takeover"
	default:
		return "server_max_window_bits=" + strconv.Itoa(8+rng.IntN(8))
	}
}

// FuzzNegotiate checks that whatever a client and a backend send, what is sent
// on is well formed, reads back as what it was, and binds the next backend.
func FuzzNegotiate(f *testing.F) {
	for _, seed := range [][2]string{
		{"", ""},
		{"permessage-deflate", "permessage-deflate"},
		{"permessage-deflate; client_max_window_bits", "permessage-deflate; client_max_window_bits=15"},
		{"permessage-deflate; server_no_context_takeover; client_no_context_takeover", "permessage-deflate; server_no_context_takeover"},
		{`permessage-deflate; server_max_window_bits="1\0", permessage-deflate`, "permessage-deflate; server_max_window_bits=8"},
		{"permessage-deflate;client_max_window_bits,deflate-frame,x-webkit-deflate-frame", ""},
		{", ,permessage-deflate ; server_max_window_bits = 10 ,", "x-foo; a=b, permessage-deflate"},
		{"permessage-deflate; server_max_window_bits=08", "permessage-deflate; ="},
		{"permessage-deflate; server_no_context_takeover\npermessage-deflate", "permessage-deflate\npermessage-deflate"},
		{`x; a="`, `x; a="\`},
	} {
		for mode := On; mode <= Off; mode++ {
			f.Add(seed[0], seed[1], uint8(mode))
		}
	}
	f.Fuzz(func(t *testing.T, offer, answer string, mode uint8) {
		client := strings.Split(offer, "\n")
		n := Negotiate(client, Mode(mode))
		sent := n.Offer()
		for _, e := range splitElements(sent) {
			if !wellFormed(e) || strings.Contains(e, "client_max_window_bits") ||
				strings.Count(e, "client_no_context_takeover") != 1 {
				t.Fatalf("offered %q to the backend", e)
			}
		}
		if Mode(mode) >= Off && sent != "" {
			t.Fatalf("mode %d offered %q", mode, sent)
		}
		// Reading our own offer changes nothing, in either mode.
		for _, m := range []Mode{On, Safe} {
			if got := Negotiate([]string{sent}, m); got != n {
				t.Fatalf("offer %q reads back as %q", sent, got.Offer())
			}
		}

		a, err := n.Accept(strings.Split(answer, "\n"))
		if err != nil {
			if a != (Agreement{}) || err.Error() == "" {
				t.Fatalf("got %q and error %q", a.Answer(), err)
			}
			return
		}
		if a.Compressed() && !acceptable(sent, a.Answer()) {
			t.Fatalf("offered %q, client told %q", sent, a.Answer())
		}
		// A backend that answers what the client was told can take over.
		later, err := a.Redial().Accept([]string{a.Answer()})
		if err != nil || later != a || a.Agrees(later) != nil {
			t.Fatalf("client told %q, re-dial led to %q, %v", a.Answer(), later.Answer(), err)
		}
		// What held for the first backend holds for it as the second.
		if _, err := a.Redial().Accept(strings.Split(answer, "\n")); err != nil {
			t.Fatalf("client told %q, answer %q failed when repeated: %v", a.Answer(), answer, err)
		}
	})
}
