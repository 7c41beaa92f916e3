// This file holds the fuzz test of the parser.

package frame

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/gobwas/ws"
)

// FuzzReader feeds arbitrary bytes in arbitrary pieces: what is handed out are
// legal frames, and what went in up to some point, which is the limit if it is that.
func FuzzReader(f *testing.F) {
	text := Append(nil, ws.OpText, []byte("hello"), true)
	f.Add(text, uint64(1), true, false, uint32(0))
	f.Add(Append(bytes.Clone(text), ws.OpPing, nil, true), uint64(2), true, true, uint32(0))
	f.Add(AppendClose(nil, 1001, "going away", false), uint64(3), false, false, uint32(0))
	f.Add(Append(nil, ws.OpBinary, make([]byte, 70000), false), uint64(4), false, false, uint32(0))
	f.Add(append(start(false), 0x89, 0, 0x80, 1, 'x'), uint64(5), false, false, uint32(0))
	f.Add([]byte{0xc1, 1, 'x', 0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0}, uint64(6), false, true, uint32(0))
	f.Add(AppendClose(nil, 1000, "\xff", true), uint64(7), true, false, uint32(0))
	f.Add(Append(bytes.Clone(start(true)), ws.OpPing, nil, true), uint64(9), true, false, uint32(4))
	f.Add(append(start(false), 0x80, 127, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff), uint64(10), false, false, uint32(70000))
	f.Add(Append(nil, ws.OpBinary, make([]byte, 70000), true), uint64(11), true, false, uint32(69999))
	for _, o := range offences() {
		if o.length < 1000 {
			f.Add(o.wire(true), uint64(8), true, o.compressed, uint32(0))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, split uint64, masked, compressed bool, limit uint32) {
		// A header that claims much needs much to be of interest.
		in = append(in, make([]byte, split%3*40000)...)
		rng := rand.New(rand.NewPCG(split, 0))
		var r Reader
		r.Init(masked, compressed)
		r.SetLimit(int64(limit))
		units, err := collect(t, &r, &chunks{in, chunkSizes(rng)})
		var offence ProtocolError
		if err != nil && !errors.As(err, &offence) && (limit == 0 || !errors.Is(err, ErrTooBig)) {
			t.Fatalf("got error %v, want a ProtocolError, ErrTooBig if there is a limit, or none", err)
		}
		rest := compare(t, in, units)
		if limit > 0 && offence == "" {
			legal, whole := upToLimit(in, int64(limit))
			if whole == (err != nil) || !whole && len(in)-rest != len(legal) {
				t.Fatalf("got error %v after %d bytes, want it after %d of %d", err, len(in)-rest, len(legal), len(in))
			}
		}

		// A second Reader takes it all, and finds the same in it.
		var second Reader
		second.Init(masked, compressed)
		second.SetLimit(int64(limit))
		again, err := collect(t, &second, bytes.NewReader(wire(units)))
		if err != nil || !bytes.Equal(wire(again), wire(units)) {
			t.Fatalf("got %d bytes, error %v from what was handed out, want all %d", len(wire(again)), err, len(wire(units)))
		}
		r.Release()
		second.Release()
	})
}
