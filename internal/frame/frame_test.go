// This file tests frames that the proxy makes itself, and close payloads.

package frame

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/fnv"
	"math/rand/v2"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/gobwas/ws"
)

func hash(p []byte) uint64 {
	h := fnv.New64a()
	_, _ = h.Write(p)
	return h.Sum64()
}

func TestAppend(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, masked := range []bool{false, true} {
		for _, size := range []int{0, 1, 125, 126, 65535, 65536, 100000} {
			payload := make([]byte, size)
			for i := range payload {
				payload[i] = byte(rng.Uint32())
			}
			before := bytes.Clone(payload)
			got := Append([]byte("prefix"), ws.OpBinary, payload, masked)
			if !bytes.HasPrefix(got, []byte("prefix")) {
				t.Fatalf("masked %t, %d bytes: what dst held is gone", masked, size)
			}
			if !bytes.Equal(payload, before) {
				t.Fatalf("masked %t, %d bytes: the payload given was changed", masked, size)
			}
			h, n := header(t, got[len("prefix"):])
			want := ws.Header{Fin: true, OpCode: ws.OpBinary, Masked: masked, Mask: h.Mask, Length: int64(size)}
			if h != want || n != ws.HeaderSize(h) {
				t.Fatalf("got header %+v in %d bytes, want %+v", h, n, want)
			}
			p := got[len("prefix")+n:]
			if masked {
				ws.Cipher(p, h.Mask, 0)
			}
			if !bytes.Equal(p, payload) {
				t.Fatalf("masked %t, %d bytes: got another payload", masked, size)
			}
		}
	}
}

func TestAppendUsesAFreshMaskEachTime(t *testing.T) {
	seen := map[[4]byte]int{}
	for range 64 {
		h, _ := header(t, Append(nil, ws.OpPing, []byte("ping"), true))
		seen[h.Mask]++
	}
	if len(seen) < 60 {
		t.Errorf("got %d different keys in 64 frames, want about 64", len(seen))
	}
}

func TestAppendClose(t *testing.T) {
	for _, test := range []struct {
		name, reason string
		code         uint16
		want         string
	}{
		{"no status", "is not sent", NoStatus, ""},
		{"no reason", "", 1000, ""},
		{"short", "going away", 1001, "going away"},
		{"longest", strings.Repeat("x", 123), 1001, strings.Repeat("x", 123)},
		{"one too many", strings.Repeat("x", 124), 1001, strings.Repeat("x", 123)},
		{"two-byte rune at the limit", strings.Repeat("x", 122) + "é", 1001, strings.Repeat("x", 122)},
		{"three-byte runes fill it", strings.Repeat("€", 50), 1001, strings.Repeat("€", 41)},
		{"four-byte runes do not", strings.Repeat("🦀", 40), 1001, strings.Repeat("🦀", 30)},
		{"much too long", strings.Repeat("ab", 5000), 4000, strings.Repeat("ab", 61) + "a"},
	} {
		for _, masked := range []bool{false, true} {
			t.Run(test.name, func(t *testing.T) {
				var r Reader
				r.Init(masked, false)
				units, err := collect(t, &r, bytes.NewReader(AppendClose(nil, test.code, test.reason, masked)))
				if err != nil || len(units) != 1 {
					t.Fatalf("got %d units, error %v, want one close frame", len(units), err)
				}
				u := units[0]
				if u.Op != ws.OpClose || u.Code != test.code || u.Reason != test.want || !utf8.ValidString(u.Reason) {
					t.Errorf("got %v, code %d, reason %q, want code %d, reason %q", u.Op, u.Code, u.Reason, test.code, test.want)
				}
				if test.code == NoStatus && len(u.Payload) != 0 {
					t.Errorf("got a payload of %d bytes, want none", len(u.Payload))
				}
			})
		}
	}
}

func TestValidCloseCode(t *testing.T) {
	valid := map[uint16]bool{
		1000: true, 1001: true, 1002: true, 1003: true, 1007: true, 1008: true, 1009: true,
		1010: true, 1011: true, 1012: true, 1013: true, 1014: true,
	}
	for code := range 1 << 16 {
		want := valid[uint16(code)] || code >= 3000 && code <= 4999
		if got := ValidCloseCode(uint16(code)); got != want {
			t.Errorf("code %d: got valid %t, want %t", code, got, want)
		}
	}
}

func TestCloseFrames(t *testing.T) {
	payload := func(code uint16, reason string) []byte {
		return append(binary.BigEndian.AppendUint16(nil, code), reason...)
	}
	for _, test := range []struct {
		name    string
		payload []byte
		code    uint16
		reason  string
		ok      bool
	}{
		{"empty", nil, NoStatus, "", true},
		{"code alone", payload(1000, ""), 1000, "", true},
		{"code and reason", payload(1013, "try again later"), 1013, "try again later", true},
		{"try again elsewhere", payload(1014, ""), 1014, "", true},
		{"of a library", payload(3000, ""), 3000, "", true},
		{"of an application", payload(4999, "ende ☠"), 4999, "ende ☠", true},
		{"longest reason", payload(1000, strings.Repeat("x", 123)), 1000, strings.Repeat("x", 123), true},
		{"one byte", []byte{3}, 0, "", false},
		{"code 0", payload(0, ""), 0, "", false},
		{"code 999", payload(999, ""), 0, "", false},
		{"code 1004", payload(1004, ""), 0, "", false},
		{"code 1005", payload(1005, ""), 0, "", false},
		{"code 1006", payload(1006, ""), 0, "", false},
		{"code 1015", payload(1015, ""), 0, "", false},
		{"code 1016", payload(1016, ""), 0, "", false},
		{"code 2999", payload(2999, ""), 0, "", false},
		{"code 5000", payload(5000, ""), 0, "", false},
		{"code 65535", payload(65535, ""), 0, "", false},
		{"reason not UTF-8", payload(1000, "bad \xff"), 0, "", false},
		{"reason with half a rune", payload(1000, "\xe2\x82"), 0, "", false},
		{"reason with a surrogate", payload(1000, "\xed\xa0\x80"), 0, "", false},
	} {
		for _, masked := range []bool{false, true} {
			t.Run(test.name, func(t *testing.T) {
				text := Append(nil, ws.OpText, []byte("before"), masked)
				stream := Append(bytes.Clone(text), ws.OpClose, test.payload, masked)
				for _, step := range []int{1, len(stream)} {
					var r Reader
					r.Init(masked, false)
					units, err := collect(t, &r, &chunks{stream, func() int { return step }})
					var offence ProtocolError
					if !test.ok {
						if !errors.As(err, &offence) || !bytes.Equal(wire(units), text) {
							t.Fatalf("got %d units, error %v, want a ProtocolError after the first message", len(units), err)
						}
						continue
					}
					if err != nil || len(units) != 2 || units[1].Code != test.code || units[1].Reason != test.reason {
						t.Fatalf("got %+v, error %v, want code %d, reason %q", units, err, test.code, test.reason)
					}
				}
			})
		}
	}
}
