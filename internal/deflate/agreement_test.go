// This file tests what happens on later backends.

package deflate

import (
	"strings"
	"testing"
)

func TestRedial(t *testing.T) {
	const limited = "permessage-deflate; server_max_window_bits=10"
	for _, tc := range []struct {
		name      string
		offer     string
		first     string
		wantOffer string
		second    string
		wantErr   string
	}{
		{"not compressed, nothing is offered again", "permessage-deflate", "", "", "", ""},
		{"not compressed, backend compresses", "permessage-deflate", "", "", "permessage-deflate", "was answered but not offered"},
		{"compressed", "permessage-deflate", "permessage-deflate", plain, "permessage-deflate", ""},
		{"compressed, backend declines", "permessage-deflate", "permessage-deflate", plain, "", "was declined"},
		{
			"first backend's unasked window binds nobody", "permessage-deflate", "permessage-deflate; server_max_window_bits=9",
			plain, "permessage-deflate; server_max_window_bits=15", "",
		},
		{"client's limit binds", limited, "permessage-deflate; server_max_window_bits=8", plain + "; server_max_window_bits=10", limited, ""},
		{
			"client's limit binds, exceeded", limited, limited, plain + "; server_max_window_bits=10",
			"permessage-deflate; server_max_window_bits=12", "server_max_window_bits=12 was answered, at most 10",
		},
		{
			"client's limit binds, missing", limited, limited, plain + "; server_max_window_bits=10",
			"permessage-deflate", "server_max_window_bits=10 was offered but not answered",
		},
		{"first backend's server_no_context_takeover binds", "permessage-deflate", fresh, fresh, fresh, ""},
		{
			"first backend's server_no_context_takeover binds, missing", "permessage-deflate", fresh, fresh, plain,
			"server_no_context_takeover was offered but not answered",
		},
		{"client's server_no_context_takeover binds", fresh, fresh, fresh, plain, "server_no_context_takeover was offered but not answered"},
		{"later backend gives more", "permessage-deflate", plain, plain, fresh, ""},
		{
			"only one alternative is left", limited + ", permessage-deflate; server_no_context_takeover", fresh, fresh,
			limited, "server_no_context_takeover was offered but not answered",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			told, err := Negotiate([]string{tc.offer}, On).Accept([]string{tc.first})
			if err != nil {
				t.Fatal(err)
			}
			n := told.Redial()
			if got := n.Offer(); got != tc.wantOffer {
				t.Errorf("offer: got %q, want %q", got, tc.wantOffer)
			}
			later, err := n.Accept([]string{tc.second})
			switch {
			case tc.wantErr == "" && err != nil:
				t.Fatal(err)
			case tc.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tc.wantErr)):
				t.Fatalf("got error %v, want %q", err, tc.wantErr)
			case err == nil:
				if err := told.Agrees(later); err != nil {
					t.Errorf("accepted, but does not agree: %v", err)
				}
			}
		})
	}
}

func TestAgrees(t *testing.T) {
	var (
		none       = Agreement{}
		unlimited  = Agreement{newTerms(anyWindow, false)}
		anyFresh   = Agreement{newTerms(anyWindow, true)}
		ten        = Agreement{newTerms(10, false)}
		twelve     = Agreement{newTerms(12, false)}
		tenFresh   = Agreement{newTerms(10, true)}
		eightFresh = Agreement{newTerms(8, true)}
	)
	for _, tc := range []struct {
		name        string
		told, later Agreement
		wantErr     string
	}{
		{"none, none", none, none, ""},
		{"none, compressed", none, unlimited, "no compression"},
		{"compressed, none", unlimited, none, "was declined"},
		{"same", tenFresh, tenFresh, ""},
		{"more is fine", unlimited, eightFresh, ""},
		{"smaller window", twelve, ten, ""},
		{"larger window", ten, twelve, "server_max_window_bits=10"},
		{"no window", ten, unlimited, "server_max_window_bits=10"},
		{"keeps its context", anyFresh, unlimited, "server_no_context_takeover"},
		{"keeps its context in a smaller window", anyFresh, ten, "server_no_context_takeover"},
		{"fresh contexts in a larger window", ten, anyFresh, "server_max_window_bits=10"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.told.Agrees(tc.later)
			if tc.wantErr == "" && err != nil {
				t.Fatal(err)
			}
			if tc.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tc.wantErr)) {
				t.Fatalf("got error %v, want %q", err, tc.wantErr)
			}
		})
	}
}
