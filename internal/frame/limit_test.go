// This file tests how large a message may be: what is allowed arrives whole, and
// of a frame that is too much not a byte is passed on.

package frame

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/gobwas/ws"
)

// part is a frame whose payload is size bytes.
type part struct {
	op   ws.OpCode
	fin  bool
	size int
}

func (p part) wire(masked, compressed bool) []byte {
	h := ws.Header{Fin: p.fin, OpCode: p.op, Masked: masked}
	if compressed && p.op != ws.OpContinuation && !p.op.IsControl() {
		h.Rsv = ws.Rsv(true, false, false)
	}
	return put(nil, rand.New(rand.NewPCG(uint64(p.size), 1)), h, p.size)
}

func TestLimit(t *testing.T) {
	const text, more, ping, pong = ws.OpText, ws.OpContinuation, ws.OpPing, ws.OpPong
	for _, test := range []struct {
		name  string
		limit int64
		parts []part
		legal int // how many of the parts are passed on; the next one is refused
	}{
		{"no limit", 0, []part{{text, true, 300_000}}, 1},
		{"below", 100, []part{{text, true, 99}}, 1},
		{"at", 100, []part{{text, true, 100}}, 1},
		{"above", 100, []part{{text, true, 101}}, 0},
		{"empty, limit 1", 1, []part{{text, true, 0}}, 1},
		{"at, in parts of a large buffer", 300_000, []part{{text, true, 300_000}}, 1},
		{"above, in parts of a large buffer", 300_000, []part{{text, true, 300_001}}, 0},
		{"each message for itself", 100, []part{{text, true, 100}, {text, true, 100}, {text, true, 101}}, 2},
		{"sum of fragments at", 100, []part{{text, false, 40}, {more, false, 40}, {more, true, 20}}, 3},
		{"sum of fragments above", 100, []part{{text, false, 40}, {more, false, 40}, {more, true, 21}}, 2},
		{"sum of large fragments at", 200_000, []part{{text, false, 99_999}, {more, true, 100_001}}, 2},
		{"sum of large fragments above", 200_000, []part{{text, false, 100_000}, {more, true, 100_001}}, 1},
		{"each fragmented message for itself", 100, []part{{text, false, 60}, {more, true, 40}, {text, false, 60}, {more, true, 41}}, 3},
		{"empty fragments at", 100, []part{{text, false, 0}, {more, false, 100}, {more, false, 0}, {more, true, 0}}, 4},
		{"after empty fragments above", 100, []part{{text, false, 0}, {more, false, 100}, {more, false, 0}, {more, true, 1}}, 3},
		{"empty first fragment does not lift it", 100, []part{{text, false, 0}, {more, true, 101}}, 1},
		{"control frames do not count", 100, []part{{ping, true, 125}, {text, false, 50}, {ping, true, 125}, {pong, true, 125}, {more, true, 50}}, 5},
		{"control frames do not reset it", 100, []part{{text, false, 50}, {ping, true, 0}, {more, true, 51}}, 2},
		{"control frames may be larger", 1, []part{{ping, true, 125}, {pong, true, 125}, {ws.OpClose, true, 0}}, 3},
	} {
		for i := range 4 {
			masked, compressed := i%2 == 0, i/2 == 0
			var in [][]byte
			for _, p := range test.parts {
				in = append(in, p.wire(masked, compressed))
			}
			stream, want := bytes.Join(in, nil), bytes.Join(in[:test.legal], nil)
			for name, step := range map[string]int{"byte by byte": 1, "in pieces": 20_000, "at once": len(stream)} {
				t.Run(fmt.Sprintf("%s/masked %t, compressed %t/%s", test.name, masked, compressed, name), func(t *testing.T) {
					var r Reader
					r.Init(masked, compressed)
					r.SetLimit(test.limit)
					units, err := collect(t, &r, &chunks{stream, func() int { return step }})
					if rest := compare(t, want, units); rest != 0 {
						t.Errorf("got %d bytes less than what is allowed", rest)
					}
					if refused := test.legal < len(in); errors.Is(err, ErrTooBig) != refused || !refused && err != nil {
						t.Errorf("got error %v, want ErrTooBig: %t", err, refused)
					}
					if u, again := r.Next(); u != nil || !errors.Is(again, err) {
						t.Errorf("got unit %v, error %v after that, want %v again", u, again, err)
					}
					r.Release()
				})
			}
		}
	}
}

// What a header announces is enough, and cannot overflow.
func TestAHeaderAloneIsTooBig(t *testing.T) {
	longest := []byte{0x82, 127, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	for _, test := range []struct {
		name   string
		limit  int64
		before []part
		header []byte
		want   error
	}{
		{"longest length", 100, nil, longest, ErrTooBig},
		{"longest length after a fragment", 100, []part{{ws.OpText, false, 100}}, append([]byte{0x80}, longest[1:]...), ErrTooBig},
		{"longest length, limit one below", 1<<63 - 2, nil, longest, ErrTooBig},
		{"longest length, limit as large", 1<<63 - 1, nil, longest, nil},
		{"longest length, no limit", 0, nil, longest, nil},
		{"one byte too much", 65536, nil, []byte{0x82, 127, 0, 0, 0, 0, 0, 1, 0, 1}, ErrTooBig},
		{"16-bit length", 125, nil, []byte{0x82, 126, 0, 126}, ErrTooBig},
		{"7-bit length", 9, nil, []byte{0x82, 10}, ErrTooBig},
		{"nothing left", 100, []part{{ws.OpText, false, 100}}, []byte{0x80, 1}, ErrTooBig},
		{"not announced yet", 9, nil, []byte{0x82, 126, 0}, nil},
		{"another offence as well", 100, nil, append([]byte{0xc2}, longest[1:]...), errRSV},
	} {
		t.Run(test.name, func(t *testing.T) {
			var r Reader
			r.Init(false, false)
			r.SetLimit(test.limit)
			var before []byte
			for _, p := range test.before {
				before = append(before, p.wire(false, false)...)
			}
			units, err := collect(t, &r, bytes.NewReader(append(bytes.Clone(before), test.header...)))
			if !errors.Is(err, test.want) || err != nil && test.want == nil {
				t.Errorf("got error %v, want %v", err, test.want)
			}
			if !bytes.Equal(wire(units), before) {
				t.Errorf("got %d bytes handed out, want the %d before that frame", len(wire(units)), len(before))
			}
		})
	}
}

// A message keeps the limit it began with, whatever it is changed to on its way.
func TestAChangedLimitCountsForTheNextMessage(t *testing.T) {
	for _, test := range []struct {
		name          string
		before, after int64
		first         []part // handed out before the change
		then          []part
		legal         int // of those after it
	}{
		{"lowered, next message", 100, 50, []part{{ws.OpText, true, 100}}, []part{{ws.OpText, true, 50}, {ws.OpText, true, 51}}, 1},
		{"lowered, message under way", 100, 50, []part{{ws.OpText, false, 60}}, []part{{ws.OpContinuation, true, 40}, {ws.OpText, true, 51}}, 1},
		{"lowered, message under way beyond the old one", 100, 50, []part{{ws.OpText, false, 60}}, []part{{ws.OpContinuation, true, 41}}, 0},
		{"raised, next message", 50, 100, []part{{ws.OpText, true, 50}}, []part{{ws.OpText, true, 100}, {ws.OpText, true, 101}}, 1},
		{"raised, message under way", 50, 100, []part{{ws.OpText, false, 50}}, []part{{ws.OpContinuation, true, 1}}, 0},
		{"lifted", 50, 0, []part{{ws.OpText, true, 50}}, []part{{ws.OpText, true, 70_000}}, 1},
		{"lifted, message under way", 50, 0, []part{{ws.OpText, false, 50}}, []part{{ws.OpContinuation, true, 1}}, 0},
		{"set, next message", 0, 50, []part{{ws.OpText, true, 70_000}}, []part{{ws.OpText, true, 51}}, 0},
		{"set, message under way", 0, 50, []part{{ws.OpText, false, 70_000}}, []part{{ws.OpContinuation, true, 70_000}, {ws.OpText, true, 51}}, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			frames := func(parts []part) (b []byte) {
				for _, p := range parts {
					b = append(b, p.wire(true, false)...)
				}
				return b
			}
			var r Reader
			r.Init(true, false)
			r.SetLimit(test.before)
			if _, err := collect(t, &r, bytes.NewReader(frames(test.first))); err != nil {
				t.Fatalf("got error %v before the change, want none", err)
			}
			r.SetLimit(test.after)
			units, err := collect(t, &r, bytes.NewReader(frames(test.then)))
			if refused := test.legal < len(test.then); errors.Is(err, ErrTooBig) != refused {
				t.Errorf("got error %v, want ErrTooBig: %t", err, refused)
			}
			if rest := compare(t, frames(test.then[:test.legal]), units); rest != 0 {
				t.Errorf("got %d bytes less than what is allowed", rest)
			}
		})
	}
	t.Run("lowered inside a frame that was handed out in part", func(t *testing.T) {
		in := part{ws.OpBinary, true, 200_000}.wire(true, false)
		var r Reader
		r.Init(true, false)
		r.SetLimit(200_000)
		begun, err := collect(t, &r, bytes.NewReader(in[:100_000]))
		if err != nil || !inMessage(&r) {
			t.Fatalf("got error %v, want a message under way", err)
		}
		r.SetLimit(1)
		rest, err := collect(t, &r, bytes.NewReader(in[100_000:]))
		if err != nil || compare(t, in, append(begun, rest...)) != 0 {
			t.Errorf("got error %v after %d bytes, want the whole message", err, len(wire(rest)))
		}
	})
	t.Run("a new peer has none", func(t *testing.T) {
		var r Reader
		r.Init(true, false)
		r.SetLimit(1)
		r.Init(true, false)
		if _, err := collect(t, &r, bytes.NewReader(part{ws.OpText, true, 70_000}.wire(true, false))); err != nil {
			t.Errorf("got error %v, want none", err)
		}
	})
}

func TestRandomStreamsComeOutUpToTheLimit(t *testing.T) {
	refused := 0
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 1009))
		masked, compressed := seed%2 == 0, seed%4 < 2
		in := randomStream(rng, masked, compressed)
		limit := []int64{1, 100, 125, 470, 2000, 65536, 300_000}[rng.IntN(7)]
		t.Run(fmt.Sprintf("seed %d, limit %d", seed, limit), func(t *testing.T) {
			var r Reader
			r.Init(masked, compressed)
			r.SetLimit(limit)
			units, err := collect(t, &r, &chunks{left: in, next: chunkSizes(rng)})
			legal, whole := upToLimit(in, limit)
			if !whole {
				refused++
			}
			if errors.Is(err, ErrTooBig) == whole || whole && err != nil {
				t.Errorf("got error %v, want ErrTooBig: %t", err, !whole)
			}
			if rest := compare(t, legal, units); rest != 0 {
				t.Errorf("got %d bytes less than what is allowed", rest)
			}
			r.Release()
		})
	}
	if refused < 10 || refused > 50 {
		t.Errorf("got %d streams of 60 refused, want some and not all: the test is void", refused)
	}
}

// upToLimit returns the frames of a legal stream before the first one that makes
// its message larger than limit, and whether those are all.
func upToLimit(stream []byte, limit int64) (legal []byte, whole bool) {
	room := limit
	for at := 0; ; {
		from := bytes.NewReader(stream[at:])
		h, err := ws.ReadHeader(from)
		if err != nil {
			return stream, true
		}
		if !h.OpCode.IsControl() {
			if h.OpCode != ws.OpContinuation {
				room = limit
			}
			if h.Length > room {
				return stream[:at], false
			}
			room -= h.Length
		}
		if h.Length > int64(from.Len()) {
			return stream, true // the last one is not all there
		}
		at = len(stream) - from.Len() + int(h.Length)
	}
}

// A length that no buffer and no sum of integers holds is a frame like others.
func TestTheLongestFrameIsStreamed(t *testing.T) {
	var r Reader
	r.Init(false, false)
	wire := append([]byte{0x82, 127, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, make([]byte, 3*MinFragment)...)
	src, got := bytes.NewReader(wire), 0
	for src.Len() > 0 {
		if err := r.Fill(src); err != nil {
			t.Fatalf("got %v after %d bytes, want fragments", err, got)
		}
		for u, err := r.Next(); u != nil || err != nil; u, err = r.Next() {
			if err != nil {
				t.Fatal(err)
			}
			got += len(u.Payload)
		}
	}
	if got < 2*MinFragment {
		t.Errorf("got %d bytes of payload, want what had come of it", got)
	}
}
