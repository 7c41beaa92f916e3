// This file holds the table tests: one client family or one rule a row.

package deflate

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

const (
	plain = "permessage-deflate; client_no_context_takeover"
	fresh = "permessage-deflate; client_no_context_takeover; server_no_context_takeover"
)

func TestParseMode(t *testing.T) {
	for in, want := range map[string]Mode{"": On, "on": On, "safe": Safe, "off": Off} {
		if got, err := ParseMode(in); err != nil || got != want {
			t.Errorf("%q: got %v, %v, want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"ON", "yes", " on", "deflate"} {
		if _, err := ParseMode(in); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", in)) {
			t.Errorf("%q: got error %v, want one that quotes the value", in, err)
		}
	}
}

// TestClientFamilies is what each client is told through the proxy, with a
// backend that accepts everything and one that adds what it may.
func TestClientFamilies(t *testing.T) {
	const (
		netty     = "permessage-deflate;client_max_window_bits,deflate-frame,x-webkit-deflate-frame"
		nettyJZ   = "permessage-deflate,deflate-frame,x-webkit-deflate-frame"
		nettyTold = "permessage-deflate;client_no_context_takeover;client_max_window_bits,deflate-frame,x-webkit-deflate-frame"
	)
	for _, tc := range []struct {
		name   string
		offer  string
		mode   Mode
		want   string // to the backend
		answer string // of the backend
		told   string // to the client
	}{
		{"chromium", "permessage-deflate; client_max_window_bits", On, plain, "permessage-deflate", plain},
		{
			"chromium, answer has all it may", "permessage-deflate; client_max_window_bits", On, plain,
			"permessage-deflate; server_no_context_takeover; client_no_context_takeover; server_max_window_bits=12", fresh,
		},
		{"chromium, safe", "permessage-deflate; client_max_window_bits", Safe, "", "", ""},
		{"chromium, off", "permessage-deflate; client_max_window_bits", Off, "", "", ""},
		{"firefox", "permessage-deflate", On, plain, plain, plain},
		{"safari", "permessage-deflate", On, plain, plain, plain},
		{"safari before permessage-deflate", "x-webkit-deflate-frame", On, "", "", ""},
		{"ws", "permessage-deflate; client_max_window_bits", On, plain, plain, plain},
		{
			"ws, both takeovers off", "permessage-deflate; server_no_context_takeover; client_no_context_takeover; client_max_window_bits",
			Safe, fresh, fresh, fresh,
		},
		{
			"ws, both windows set", "permessage-deflate; server_max_window_bits=10; client_max_window_bits=10", On,
			plain + "; server_max_window_bits=10", "permessage-deflate; server_max_window_bits=9",
			plain + "; server_max_window_bits=10",
		},
		{"gorilla", "permessage-deflate; server_no_context_takeover; client_no_context_takeover", On, fresh, fresh, fresh},
		{"gorilla, safe", "permessage-deflate; server_no_context_takeover; client_no_context_takeover", Safe, fresh, fresh, fresh},
		{
			"gorilla, answer without client_no_context_takeover",
			"permessage-deflate; server_no_context_takeover; client_no_context_takeover", On, fresh,
			"permessage-deflate; server_no_context_takeover", fresh,
		},
		{"coder, context takeover", "permessage-deflate", On, plain, "permessage-deflate; server_max_window_bits=11", plain},
		{
			"coder, no context takeover", "permessage-deflate; client_no_context_takeover; server_no_context_takeover", On,
			fresh, fresh, fresh,
		},
		{"okhttp", "permessage-deflate", On, plain, plain, plain},
		{"okhttp, safe", "permessage-deflate", Safe, "", "", ""},
		{".net, python websockets, aiohttp", "permessage-deflate; client_max_window_bits=15", On, plain, plain, plain},
		{"netty", netty, On, "", "", ""},
		{"netty, safe", netty, Safe, "", "", ""},
		{"netty with the jdk's zlib", nettyJZ, On, "", "", ""},
		{"netty that allows client_no_context_takeover", nettyTold, On, plain, plain, plain},
		{"netty, permessage-deflate alone", "permessage-deflate;client_max_window_bits", Safe, "", "", ""},
		{"no compression", "", On, "", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := Negotiate([]string{tc.offer}, tc.mode)
			if got := n.Offer(); got != tc.want {
				t.Fatalf("offer: got %q, want %q", got, tc.want)
			}
			a, err := n.Accept([]string{tc.answer})
			if err != nil {
				t.Fatal(err)
			}
			if got := a.Answer(); got != tc.told {
				t.Errorf("answer: got %q, want %q", got, tc.told)
			}
			if got, want := a.Compressed(), tc.told != ""; got != want {
				t.Errorf("compressed: got %t, want %t", got, want)
			}
		})
	}
}

func TestOffer(t *testing.T) {
	const limited = plain + "; server_max_window_bits=10"
	for _, tc := range []struct {
		name  string
		offer []string
		want  string
	}{
		{"none", nil, ""},
		{"empty header", []string{""}, ""},
		{"space only", []string{" \t"}, ""},
		{"empty elements", []string{", ,permessage-deflate,, "}, plain},
		{"space around everything", []string{"\t permessage-deflate ; server_max_window_bits = 10 , "}, limited},
		{"no space", []string{"permessage-deflate;server_max_window_bits=10"}, limited},
		{"case of tokens", []string{"PerMessage-Deflate; Server_Max_Window_Bits=10"}, limited},
		{"quoted value", []string{`permessage-deflate; server_max_window_bits="10"`}, limited},
		{"quoted pair", []string{`permessage-deflate; server_max_window_bits="1\0"`}, limited},
		{"client_no_context_takeover once", []string{plain}, plain},
		{"client_max_window_bits with value", []string{`permessage-deflate; client_max_window_bits="9"`}, plain},
		{"smallest window", []string{"permessage-deflate; server_max_window_bits=8"}, plain + "; server_max_window_bits=8"},
		{"largest window is kept", []string{"permessage-deflate; server_max_window_bits=15"}, plain + "; server_max_window_bits=15"},
		{"all parameters", []string{"permessage-deflate; client_max_window_bits; server_max_window_bits=10; " +
			"client_no_context_takeover; server_no_context_takeover"}, fresh + "; server_max_window_bits=10"},

		{"other extensions are left out", []string{"permessage-bzip2; a=b, permessage-deflate, x-foo"}, plain},
		{"other extension with what is wrong in ours", []string{"x-foo; a; a; b=1, permessage-deflate"}, plain},
		{"alternatives in order", []string{"permessage-deflate; server_max_window_bits=10, permessage-deflate"}, limited + ", " + plain},
		{"alternatives in other order", []string{"permessage-deflate, permessage-deflate; server_max_window_bits=10"}, plain + ", " + limited},
		{"alternatives in two headers", []string{"permessage-deflate; server_no_context_takeover", "permessage-deflate"}, fresh + ", " + plain},
		{"alternatives that become one", []string{"permessage-deflate; client_max_window_bits, permessage-deflate"}, plain},

		{"unknown parameter", []string{"permessage-deflate; foo"}, ""},
		{"unknown parameter, other element stands", []string{"permessage-deflate; foo, permessage-deflate"}, plain},
		{"takeover twice", []string{"permessage-deflate; client_no_context_takeover; client_no_context_takeover"}, ""},
		{"window twice", []string{"permessage-deflate; server_max_window_bits=10; server_max_window_bits=10"}, ""},
		{"twice in different case", []string{"permessage-deflate; client_max_window_bits; CLIENT_MAX_WINDOW_BITS"}, ""},
		{"takeover with value", []string{"permessage-deflate; server_no_context_takeover=true"}, ""},
		{"server window without value", []string{"permessage-deflate; server_max_window_bits"}, ""},
		{"window too small", []string{"permessage-deflate; server_max_window_bits=7"}, ""},
		{"window too large", []string{"permessage-deflate; server_max_window_bits=16"}, ""},
		{"window far too large", []string{"permessage-deflate; server_max_window_bits=99999999999999999999"}, ""},
		{"leading zero", []string{"permessage-deflate; server_max_window_bits=08"}, ""},
		{"leading zero of two digits", []string{"permessage-deflate; server_max_window_bits=010"}, ""},
		{"sign", []string{"permessage-deflate; server_max_window_bits=+9"}, ""},
		{"not a number", []string{"permessage-deflate; client_max_window_bits=a"}, ""},
		{"client window out of range", []string{"permessage-deflate; client_max_window_bits=16"}, ""},

		{"parameter without name", []string{"permessage-deflate; =10, permessage-deflate"}, ""},
		{"element without name", []string{"; server_max_window_bits=10, permessage-deflate"}, ""},
		{"trailing semicolon", []string{"permessage-deflate;"}, ""},
		{"trailing equals sign", []string{"permessage-deflate; client_max_window_bits="}, ""},
		{"no separator", []string{"permessage-deflate client_max_window_bits"}, ""},
		{"open quote", []string{`permessage-deflate; server_max_window_bits="10`}, ""},
		{"open quoted pair", []string{`permessage-deflate; server_max_window_bits="10\`}, ""},
		{"empty quotes", []string{`permessage-deflate; server_max_window_bits=""`}, ""},
		{"quoted value is no token", []string{`x-foo; a="b, c", permessage-deflate`}, ""},
		{"text after quotes", []string{`permessage-deflate; server_max_window_bits="1"0`}, ""},
		{"not ascii", []string{"permessage-deflate\u2028"}, ""},
		{"control character", []string{"permessage-deflate\x00"}, ""},
		{"one malformed header of two", []string{"permessage-deflate", "permessage-deflate; ="}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := Negotiate(tc.offer, On).Offer(); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestOfferSafeKeepsOnlyWhatNamesClientNoContextTakeover(t *testing.T) {
	offer := []string{"permessage-deflate", "permessage-deflate; client_no_context_takeover; server_max_window_bits=9"}
	if got, want := Negotiate(offer, Safe).Offer(), plain+"; server_max_window_bits=9"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := Negotiate(offer, Mode(9)).Offer(); got != "" {
		t.Errorf("unknown mode: got %q, want none", got)
	}
}

func TestOfferHoldsEveryAlternative(t *testing.T) {
	var offers []string
	for _, base := range []string{"permessage-deflate", "permessage-deflate; server_no_context_takeover"} {
		offers = append(offers, base)
		for window := minWindow; window <= maxWindow; window++ {
			offers = append(offers, fmt.Sprintf("%s; server_max_window_bits=%d", base, window))
		}
	}
	got := Negotiate(slices.Concat(offers, offers), On).Offer()
	if n := strings.Count(got, "permessage-deflate"); n != maxTerms {
		t.Errorf("got %d alternatives, want %d: %s", n, maxTerms, got)
	}
}

func TestAccept(t *testing.T) {
	const (
		noLimit = "permessage-deflate"
		limit10 = "permessage-deflate; server_max_window_bits=10"
		limit15 = "permessage-deflate; server_max_window_bits=15"
		askFull = "permessage-deflate; server_no_context_takeover"
	)
	for _, tc := range []struct {
		name    string
		offer   string
		answer  []string
		want    string // to the client
		wantErr string // part of the error
	}{
		{"declined", noLimit, nil, "", ""},
		{"declined with an empty header", noLimit, []string{"", " , "}, "", ""},
		{"client_no_context_takeover is added", noLimit, []string{noLimit}, plain, ""},
		{"client_no_context_takeover is there once", noLimit, []string{plain}, plain, ""},
		{"unasked server window is dropped", noLimit, []string{limit10}, plain, ""},
		{"unasked server_no_context_takeover is told", noLimit, []string{askFull}, fresh, ""},
		{"asked server_no_context_takeover", askFull, []string{askFull}, fresh, ""},
		{"asked server window, same", limit10, []string{limit10}, plain + "; server_max_window_bits=10", ""},
		{
			"asked server window, smaller", limit10,
			[]string{"permessage-deflate; server_max_window_bits=8"},
			plain + "; server_max_window_bits=10", "",
		},
		{
			"case and quotes", limit10,
			[]string{`PERMESSAGE-DEFLATE; SERVER_MAX_WINDOW_BITS="10"`},
			plain + "; server_max_window_bits=10", "",
		},

		{
			"asked server window, larger", limit10,
			[]string{"permessage-deflate; server_max_window_bits=11"},
			"",
			"server_max_window_bits=11 was answered, at most 10 was offered",
		},
		{"asked server window, missing", limit10, []string{noLimit}, "", "server_max_window_bits=10 was offered but not answered"},
		{"asked server window of 15, missing", limit15, []string{noLimit}, "", "server_max_window_bits=15 was offered but not answered"},
		{"asked server_no_context_takeover, missing", askFull, []string{plain}, "", "server_no_context_takeover was offered but not answered"},
		{
			"client_max_window_bits", "permessage-deflate; client_max_window_bits",
			[]string{"permessage-deflate; client_max_window_bits=15"},
			"",
			"client_max_window_bits was answered but not offered",
		},
		{
			"client_max_window_bits without value", "permessage-deflate; client_max_window_bits",
			[]string{"permessage-deflate; client_max_window_bits"},
			"", "client_max_window_bits was answered but not offered",
		},
		{"client_no_context_takeover twice", noLimit, []string{plain + "; client_no_context_takeover"}, "", "client_no_context_takeover is there twice"},
		{"window out of range", noLimit, []string{"permessage-deflate; server_max_window_bits=16"}, "", `server_max_window_bits is "16"`},
		{"window without value", noLimit, []string{"permessage-deflate; server_max_window_bits"}, "", `server_max_window_bits is ""`},
		{"leading zero", noLimit, []string{"permessage-deflate; server_max_window_bits=09"}, "", `server_max_window_bits is "09"`},
		{"takeover with value", noLimit, []string{"permessage-deflate; server_no_context_takeover=1"}, "", "server_no_context_takeover takes no value"},
		{"unknown parameter", noLimit, []string{"permessage-deflate; foo=1"}, "", "foo is not a known parameter"},
		{"malformed", noLimit, []string{"permessage-deflate;"}, "", `malformed extension list "permessage-deflate;"`},
		{"two elements", noLimit, []string{"permessage-deflate, permessage-deflate"}, "", "permessage-deflate was answered twice"},
		{"two headers", noLimit, []string{"permessage-deflate", "permessage-deflate"}, "", "permessage-deflate was answered twice"},
		{"other extension", noLimit, []string{"x-foo"}, "", "extension x-foo was answered but not offered"},
		{"other extension beside ours", noLimit, []string{"permessage-deflate, deflate-frame"}, "", "extension deflate-frame was answered but not offered"},
		{"nothing was offered", "", []string{noLimit}, "", "permessage-deflate was answered but not offered"},
		{"nothing was offered, other extension", "", []string{"x-foo"}, "", "extension x-foo was answered but not offered"},

		// The client is told the looser one, whichever the backend took.
		{"limit or any, limit", limit10 + ", " + noLimit, []string{limit10}, plain, ""},
		{"limit or any, any", limit10 + ", " + noLimit, []string{noLimit}, plain, ""},
		{
			"two limits, smaller", limit10 + ", permessage-deflate; server_max_window_bits=12",
			[]string{limit10},
			plain + "; server_max_window_bits=12", "",
		},
		{
			"two limits, none kept", limit10 + ", permessage-deflate; server_max_window_bits=12",
			[]string{"permessage-deflate; server_max_window_bits=13"},
			"", "at most 12 was offered",
		},
		{"15 or any", limit15 + ", " + noLimit, []string{noLimit}, plain, ""},
		// Which alternative can be meant depends on server_no_context_takeover.
		{"limit, or any with fresh contexts: limit", limit10 + ", " + askFull, []string{limit10}, plain + "; server_max_window_bits=10", ""},
		{"limit, or any with fresh contexts: fresh", limit10 + ", " + askFull, []string{askFull}, fresh, ""},
		{"limit, or any with fresh contexts: both", limit10 + ", " + askFull, []string{askFull + "; server_max_window_bits=10"}, fresh, ""},
		{
			"limit, or any with fresh contexts: neither", limit10 + ", " + askFull,
			[]string{noLimit},
			"",
			"server_max_window_bits=10 was offered but not answered",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a, err := Negotiate([]string{tc.offer}, On).Accept(tc.answer)
			if tc.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tc.wantErr) {
					t.Fatalf("got %q, error %v, want error %q", a.Answer(), err, tc.wantErr)
				}
				if a != (Agreement{}) {
					t.Errorf("got %q beside an error, want none", a.Answer())
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := a.Answer(); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}
