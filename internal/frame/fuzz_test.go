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
// legal frames, and what went in up to some point.
func FuzzReader(f *testing.F) {
	text := Append(nil, ws.OpText, []byte("hello"), true)
	f.Add(text, uint64(1), true, false)
	f.Add(Append(bytes.Clone(text), ws.OpPing, nil, true), uint64(2), true, true)
	f.Add(AppendClose(nil, 1001, "going away", false), uint64(3), false, false)
	f.Add(Append(nil, ws.OpBinary, make([]byte, 70000), false), uint64(4), false, false)
	f.Add(append(start(false), 0x89, 0, 0x80, 1, 'x'), uint64(5), false, false)
	f.Add([]byte{0xc1, 1, 'x', 0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0}, uint64(6), false, true)
	f.Add(AppendClose(nil, 1000, "\xff", true), uint64(7), true, false)
	for _, o := range offences() {
		if o.length < 1000 {
			f.Add(o.wire(true), uint64(8), true, o.compressed)
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, split uint64, masked, compressed bool) {
		// A header that claims much needs much to be of interest.
		in = append(in, make([]byte, split%3*40000)...)
		rng := rand.New(rand.NewPCG(split, 0))
		var r Reader
		r.Init(masked, compressed)
		units, err := collect(t, &r, &chunks{in, chunkSizes(rng)})
		var offence ProtocolError
		if err != nil && !errors.As(err, &offence) {
			t.Fatalf("got error %v, want a ProtocolError or none", err)
		}
		compare(t, in, units)

		// A second Reader takes it all, and finds the same in it.
		var second Reader
		second.Init(masked, compressed)
		again, err := collect(t, &second, bytes.NewReader(wire(units)))
		if err != nil || !bytes.Equal(wire(again), wire(units)) {
			t.Fatalf("got %d bytes, error %v from what was handed out, want all %d", len(wire(again)), err, len(wire(units)))
		}
		r.Release()
		second.Release()
	})
}
