// This file tests that a peer that breaks RFC 6455 is found out before a byte of
// the offending frame is passed on, and that nothing before it is lost.

package frame

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/gobwas/ws"
)

// offence is a frame that is wrong after the frames before it. b are its bytes
// up to the masking key, with the mask bit clear: the test sets it as the peer
// must unless wrongMask is set.
type offence struct {
	name       string
	compressed bool
	inside     bool // a fragmented message is under way
	wrongMask  bool
	b          []byte
	length     int // bytes of payload that follow
}

func offences() []offence {
	all := []offence{
		{name: "mask bit wrong on text", wrongMask: true, b: []byte{0x81, 3}, length: 3},
		{name: "mask bit wrong on ping", wrongMask: true, b: []byte{0x89, 0}},
		{name: "mask bit wrong on a large frame", wrongMask: true, b: []byte{0x82, 127, 0, 0, 0, 0, 0, 1, 0x86, 0xa0}, length: 100000},
		{name: "RSV1 without compression", b: []byte{0x80 | 0x40 | 1, 3}, length: 3},
		{name: "RSV1 on a continuation", compressed: true, inside: true, b: []byte{0x80 | 0x40, 3}, length: 3},
		{name: "RSV1 on a ping", compressed: true, b: []byte{0x80 | 0x40 | 9, 0}},
		{name: "RSV1 on a pong", compressed: true, b: []byte{0x80 | 0x40 | 10, 0}},
		{name: "RSV1 on a close", compressed: true, b: []byte{0x80 | 0x40 | 8, 0}},
		{name: "RSV1 and RSV2 on text", compressed: true, b: []byte{0x80 | 0x60 | 1, 3}, length: 3},
		{name: "continuation without a start", b: []byte{0x80, 3}, length: 3},
		{name: "continuation without a start, not final", b: []byte{0x00, 3}, length: 3},
		{name: "large continuation without a start", b: []byte{0x80, 127, 0, 0, 0, 0, 0, 1, 0x86, 0xa0}, length: 100000},
		{name: "text inside a message", inside: true, b: []byte{0x81, 3}, length: 3},
		{name: "binary inside a message", inside: true, b: []byte{0x02, 3}, length: 3},
		{name: "large text inside a message", inside: true, b: []byte{0x81, 127, 0, 0, 0, 0, 0, 1, 0x86, 0xa0}, length: 100000},
		{name: "top bit of a length", b: []byte{0x82, 127, 0x80, 0, 0, 0, 0, 1, 0, 0}, length: 70000},
		{name: "all bits of a length", b: []byte{0x82, 127, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, length: 70000},
		{name: "16-bit length of 0", b: []byte{0x82, 126, 0, 0}},
		{name: "16-bit length of 125", b: []byte{0x82, 126, 0, 125}, length: 125},
		{name: "64-bit length of 3", b: []byte{0x82, 127, 0, 0, 0, 0, 0, 0, 0, 3}, length: 3},
		{name: "64-bit length of 126", b: []byte{0x82, 127, 0, 0, 0, 0, 0, 0, 0, 126}, length: 126},
		{name: "64-bit length of 65535", b: []byte{0x82, 127, 0, 0, 0, 0, 0, 0, 0xff, 0xff}, length: 65535},
		{name: "16-bit length of 5 on a ping", b: []byte{0x89, 126, 0, 5}, length: 5},
	}
	for _, bit := range []byte{0x20, 0x10} {
		for _, compressed := range []bool{false, true} {
			all = append(all,
				offence{name: fmt.Sprintf("reserved bit %#x, compression %t", bit, compressed), compressed: compressed, b: []byte{0x81 | bit, 3}, length: 3},
				offence{name: fmt.Sprintf("reserved bit %#x on a ping, compression %t", bit, compressed), compressed: compressed, b: []byte{0x89 | bit, 0}})
		}
	}
	for _, op := range []byte{3, 4, 5, 6, 7, 11, 12, 13, 14, 15} {
		for _, inside := range []bool{false, true} {
			all = append(all, offence{name: fmt.Sprintf("opcode %d, inside a message %t", op, inside), inside: inside, b: []byte{0x80 | op, 3}, length: 3})
		}
	}
	for _, op := range []byte{8, 9, 10} {
		all = append(all,
			offence{name: fmt.Sprintf("opcode %d of 126 bytes", op), b: []byte{0x80 | op, 126, 0, 126}, length: 126},
			offence{name: fmt.Sprintf("opcode %d of 65536 bytes", op), b: []byte{0x80 | op, 127, 0, 0, 0, 0, 0, 1, 0, 0}, length: 65536},
			offence{name: fmt.Sprintf("opcode %d not final", op), b: []byte{op, 3}, length: 3},
			offence{name: fmt.Sprintf("opcode %d not final inside a message", op), inside: true, b: []byte{op, 3}, length: 3})
	}
	return all
}

// wire is the offending frame as a peer sends it.
func (o offence) wire(masked bool) []byte {
	b := bytes.Clone(o.b)
	if masked != o.wrongMask {
		b[1] |= 0x80
		b = append(b, 1, 2, 3, 4)
	}
	return append(b, make([]byte, o.length)...)
}

func TestOffences(t *testing.T) {
	for _, test := range offences() {
		for _, masked := range []bool{false, true} {
			before := Append(nil, ws.OpText, []byte("one"), masked)
			before = Append(before, ws.OpPing, []byte("two"), masked)
			before = Append(before, ws.OpBinary, make([]byte, 1000), masked)
			if test.inside {
				before = append(before, start(masked)...)
			}
			stream := append(bytes.Clone(before), test.wire(masked)...)
			stream = Append(stream, ws.OpText, []byte("after"), masked)
			for name, step := range map[string]int{"byte by byte": 1, "at once": len(stream)} {
				t.Run(fmt.Sprintf("%s/masked %t/%s", test.name, masked, name), func(t *testing.T) {
					var r Reader
					r.Init(masked, test.compressed)
					units, err := collect(t, &r, &chunks{stream, func() int { return step }})
					if _, ok := errors.AsType[ProtocolError](err); !ok {
						t.Fatalf("got error %v, want a ProtocolError", err)
					}
					if got := wire(units); !bytes.Equal(got, before) {
						t.Errorf("got %d bytes handed out, want the %d before the offence", len(got), len(before))
					}
					if u, err := r.Next(); u != nil || err == nil {
						t.Errorf("got unit %v, error %v after the offence, want the error again", u, err)
					}
					r.Release()
				})
			}
		}
	}
}

// start is a first fragment.
func start(masked bool) []byte {
	b := Append(nil, ws.OpText, []byte("begun"), masked)
	b[0] &^= 0x80
	return b
}

func TestLegalRarities(t *testing.T) {
	for _, test := range []struct {
		name       string
		compressed bool
		b          []byte // unmasked
	}{
		{"RSV1 on text", true, []byte{0xc1, 1, 'x'}},
		{"RSV1 on binary", true, []byte{0xc2, 1, 'x'}},
		{"RSV1 on a first fragment", true, []byte{0x41, 1, 'x', 0x80, 1, 'y'}},
		{"no RSV1 though compressed", true, []byte{0x81, 1, 'x'}},
		{"empty fragments", false, []byte{0x01, 0, 0x00, 0, 0x00, 0, 0x80, 0}},
		{"pings inside a message", false, []byte{0x01, 1, 'x', 0x89, 0, 0x00, 1, 'y', 0x8a, 1, 'p', 0x80, 0}},
		{"a pong unasked", false, []byte{0x8a, 0}},
		{"a close inside a message", false, []byte{0x01, 1, 'x', 0x88, 0}},
		{"a message after a fragmented one", false, []byte{0x01, 1, 'x', 0x80, 1, 'y', 0x82, 1, 'z'}},
		{"text that is no UTF-8", false, []byte{0x81, 1, 0xff}},
		{"a length of 126 in 16 bits", false, append([]byte{0x82, 126, 0, 126}, make([]byte, 126)...)},
		{"a length of 65536 in 64 bits", false, append([]byte{0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0}, make([]byte, 65536)...)},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, step := range []int{1, 7, len(test.b)} {
				var r Reader
				r.Init(false, test.compressed)
				units, err := collect(t, &r, &chunks{test.b, func() int { return step }})
				if err != nil {
					t.Fatalf("%d bytes at a time: got error %v, want none", step, err)
				}
				if rest := compare(t, test.b, units); rest != 0 {
					t.Errorf("%d bytes at a time: got %d bytes less than went in", step, rest)
				}
			}
		})
	}
}
