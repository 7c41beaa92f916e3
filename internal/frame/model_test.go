// This file checks the invariants of the package comment on random streams: what
// a Reader hands out is compared with what went in by a second decoder, gobwas's.

package frame

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/gobwas/ws"
)

func TestRandomStreamsComeOutAsTheyWentIn(t *testing.T) {
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 6455))
		masked, compressed := seed%2 == 0, seed%4 < 2
		in := randomStream(rng, masked, compressed)
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			var r Reader
			r.Init(masked, compressed)
			src := &chunks{left: in, next: chunkSizes(rng)}
			if rng.IntN(3) == 0 {
				early := in[:min(len(in), rng.IntN(4096))]
				r.Preload(early)
				src.left = in[len(early):]
			}
			units, err := collect(t, &r, src)
			if err != nil {
				t.Fatalf("got error %v, want none", err)
			}
			if rest := compare(t, in, units); rest != 0 {
				t.Errorf("got %d bytes less than went in", rest)
			}
			got, want := messages(t, wire(units)), messages(t, in)
			if got != want {
				t.Errorf("got messages\n%s\nwant\n%s", got, want)
			}
			if inMessage(&r) || r.Buffered() != 0 {
				t.Errorf("got InMessage %t and %d bytes buffered after the last message, want none", inMessage(&r), r.Buffered())
			}
		})
	}
}

// randomStream is a sequence of messages, some of them fragmented, with control
// frames between and inside them.
func randomStream(rng *rand.Rand, masked, compressed bool) []byte {
	sizes := []int{
		0, 1, 125, 126, 127, 470, smallBuffer - headroom, smallBuffer - headroom + 1, smallBuffer,
		MinFragment - 1, MinFragment, MinFragment + 1, 65535, 65536, largeBuffer - headroom, 100000, 300000,
	}
	size := func() int {
		if rng.IntN(3) == 0 { // most frames are small
			return sizes[rng.IntN(len(sizes))]
		}
		return rng.IntN(300)
	}
	var b []byte
	for range 1 + rng.IntN(12) {
		op, rsv := ws.OpText, byte(0)
		if rng.IntN(2) == 0 {
			op = ws.OpBinary
		}
		if compressed && rng.IntN(2) == 0 {
			rsv = ws.Rsv(true, false, false)
		}
		frames := 1
		if rng.IntN(3) == 0 {
			frames = 1 + rng.IntN(5)
		}
		for i := range frames {
			if rng.IntN(3) == 0 {
				b = put(b, rng, ws.Header{Fin: true, OpCode: ws.OpPing, Masked: masked}, rng.IntN(126))
			}
			if rng.IntN(5) == 0 {
				b = put(b, rng, ws.Header{Fin: true, OpCode: ws.OpPong, Masked: masked}, rng.IntN(126))
			}
			b = put(b, rng, ws.Header{Fin: i == frames-1, Rsv: rsv, OpCode: op, Masked: masked}, size())
			op, rsv = ws.OpContinuation, 0
		}
	}
	if rng.IntN(2) == 0 {
		b = AppendClose(b, 1000, "that was all", masked)
	}
	return b
}

// put appends a frame with a random payload of n bytes.
func put(b []byte, rng *rand.Rand, h ws.Header, n int) []byte {
	h.Length = int64(n)
	if h.Masked {
		h.Mask = [4]byte{byte(rng.Uint32()), byte(rng.Uint32()), byte(rng.Uint32()), byte(rng.Uint32())}
	}
	var w bytes.Buffer
	_ = ws.WriteHeader(&w, h)
	b = append(b, w.Bytes()...)
	end := len(b) + n
	for len(b) < end {
		b = binary.LittleEndian.AppendUint64(b, rng.Uint64())
	}
	return b[:end]
}

// chunks is a peer whose bytes arrive in pieces.
type chunks struct {
	left []byte
	next func() int // the size of the next piece
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.left) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), c.next())], c.left)
	c.left = c.left[n:]
	return n, nil
}

// chunkSizes are from one byte to 64 KiB, in one of several fashions. Of a long
// stream only the beginning arrives byte by byte.
func chunkSizes(rng *rand.Rand) func() int {
	most := []int{1, 3, 100, 1460, 20000, 64 << 10}[rng.IntN(6)]
	calls := 0
	return func() int {
		if calls++; calls > 10000 {
			most = 2000
		}
		return 1 + rng.IntN(most)
	}
}

// collect runs a Reader as a session does, up to the end of src or an offence,
// and checks what holds for units between two calls of Fill.
func collect(t *testing.T, r *Reader, src io.Reader) (units []Unit, err error) {
	t.Helper()
	for {
		var lent, kept []Unit
		var offence error
		for {
			next, err := r.Next()
			if err != nil || next == nil {
				offence = err
				break
			}
			u := *next
			checkUnit(t, r, u)
			if len(lent) > 0 {
				checkNeighbours(t, lent[len(lent)-1].Wire, u.Wire)
			}
			lent, kept = append(lent, u), append(kept, own(u))
		}
		for i, u := range lent {
			if !bytes.Equal(u.Wire, kept[i].Wire) {
				t.Fatalf("unit %d was changed before the next Fill", len(units)+i)
			}
		}
		units = append(units, kept...)
		if offence != nil {
			return units, offence
		}
		if n := r.Buffered(); n >= MinFragment+headroom {
			t.Fatalf("got %d bytes held back, want less than a fragment", n)
		}
		if err := r.Fill(src); errors.Is(err, io.EOF) {
			return units, nil
		} else if err != nil {
			return units, err
		}
	}
}

// own returns a copy of u that shares nothing with the Reader.
func own(u Unit) Unit {
	size := len(u.Wire) - len(u.Payload)
	u.Wire = bytes.Clone(u.Wire)
	u.Payload = u.Wire[size:]
	return u
}

// checkUnit checks that u is one complete frame, and says of itself what is in it.
func checkUnit(t *testing.T, r *Reader, u Unit) {
	t.Helper()
	h, size := header(t, u.Wire)
	if int64(len(u.Wire)-size) != h.Length || size != ws.HeaderSize(h) {
		t.Fatalf("got a unit of %d bytes with header %+v, want one complete frame", len(u.Wire), h)
	}
	if u.Op != h.OpCode || u.Mask != h.Mask || !bytes.Equal(u.Payload, u.Wire[size:]) {
		t.Fatalf("got unit %v with mask %v, its frame is %+v", u.Op, u.Mask, h)
	}
	if u.Data() != (h.OpCode < ws.OpClose) {
		t.Fatalf("got Data %t for opcode %d", u.Data(), h.OpCode)
	}
	if !u.Data() {
		if u.First || u.Last {
			t.Fatalf("got a control frame that begins (%t) or ends (%t) a message", u.First, u.Last)
		}
		return
	}
	if u.First != (h.OpCode != ws.OpContinuation) || u.Last != h.Fin {
		t.Fatalf("got First %t, Last %t for %+v", u.First, u.Last, h)
	}
	if inMessage(r) == u.Last {
		t.Fatalf("got InMessage %t after a unit with Last %t", inMessage(r), u.Last)
	}
}

// checkNeighbours checks the rule by which a session writes units at once: they
// lie side by side if and only if their capacities say so.
func checkNeighbours(t *testing.T, a, b []byte) {
	t.Helper()
	adjacent := cap(a) > len(a) && &a[:len(a)+1][len(a)] == &b[0]
	if told := cap(b) == cap(a)-len(a); told != adjacent {
		t.Fatalf("capacities %d-%d and %d say adjacent %t, want %t", cap(a), len(a), cap(b), told, adjacent)
	}
}

// compare checks that units are the frames of in, unchanged or as legal
// fragments, and returns how many bytes of in they do not cover.
func compare(t *testing.T, in []byte, units []Unit) (rest int) {
	t.Helper()
	next := 0
	for len(in) > 0 && next < len(units) {
		h, size := header(t, in)
		if end := size + len(units[next].Payload); int64(len(units[next].Payload)) == h.Length && bytes.Equal(units[next].Wire, in[:end]) {
			in, next = in[end:], next+1
			continue
		}
		if h.OpCode.IsControl() {
			t.Fatalf("unit %d: got % x, want control frame % x", next, head(units[next].Wire), head(in))
		}
		in = in[size:]
		op, rsv, left := h.OpCode, h.Rsv, h.Length
		for left > 0 && next < len(units) {
			u := units[next]
			n := int64(len(u.Payload))
			got, _ := header(t, u.Wire)
			want := ws.Header{
				Fin: h.Fin && n == left, Rsv: rsv, OpCode: op,
				Masked: h.Masked, Mask: h.Mask, Length: n,
			}
			if got != want || n > left {
				t.Fatalf("unit %d: got header %+v with %d bytes left of %+v, want %+v", next, got, left, h, want)
			}
			if n < left && n < MinFragment {
				t.Fatalf("unit %d: got a fragment of %d bytes with %d to come, want at least %d", next, n, left-n, MinFragment)
			}
			if h.Masked && (h.Length-left)%4 != 0 {
				t.Fatalf("unit %d begins at offset %d of its frame, where the mask is rotated", next, h.Length-left)
			}
			if !bytes.Equal(u.Payload, in[:n]) {
				t.Fatalf("unit %d: payload differs from what went in", next)
			}
			op, rsv = ws.OpContinuation, 0
			in, left, next = in[n:], left-n, next+1
		}
	}
	if next < len(units) {
		t.Fatalf("got %d units more than went in", len(units)-next)
	}
	return len(in)
}

// messages decodes a stream into a line for each message and control frame.
func messages(t *testing.T, stream []byte) string {
	t.Helper()
	var b strings.Builder
	var op ws.OpCode
	var rsv byte
	var payload []byte
	for len(stream) > 0 {
		h, size := header(t, stream)
		p := bytes.Clone(stream[size : size+int(h.Length)])
		stream = stream[size+int(h.Length):]
		ws.Cipher(p, h.Mask, 0)
		if h.OpCode.IsControl() {
			fmt.Fprintf(&b, "control %d %x, %d bytes into the message\n", h.OpCode, p, len(payload))
			continue
		}
		if h.OpCode != ws.OpContinuation {
			op, rsv = h.OpCode, h.Rsv
		}
		payload = append(payload, p...)
		if h.Fin {
			fmt.Fprintf(&b, "message %d rsv %d, %d bytes, hash %x\n", op, rsv, len(payload), hash(payload))
			payload = nil
		}
	}
	return b.String()
}

func header(t *testing.T, wire []byte) (ws.Header, int) {
	t.Helper()
	from := bytes.NewReader(wire)
	h, err := ws.ReadHeader(from)
	if err != nil {
		t.Fatalf("decoding header % x: %v", head(wire), err)
	}
	return h, len(wire) - from.Len()
}

func wire(units []Unit) (b []byte) {
	for _, u := range units {
		b = append(b, u.Wire...)
	}
	return b
}

func head(p []byte) []byte { return p[:min(len(p), ws.MaxHeaderSize)] }

// inMessage reports whether a message of the peer has been handed out in part.
func inMessage(r *Reader) bool { return r.fragmented || r.rest > 0 }
