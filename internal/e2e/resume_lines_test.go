// This file writes what clients and backends are to say, and takes down what they have
// heard, frame by frame.

package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/gobwas/ws"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// said is a message, or a control frame.
type said struct {
	op      ws.OpCode
	payload string
}

func (s said) String() string {
	if len(s.payload) > 40 {
		return fmt.Sprintf("%v of %d bytes %.20q…", s.op, len(s.payload), s.payload)
	}
	return fmt.Sprintf("%v %q", s.op, s.payload)
}

// hearing is what one side has heard so far, frame by frame.
type hearing struct {
	messages []said
	pings    []string
	pongs    []string
	frames   int
	part     *said // a message that has begun
	fault    error // a frame where none may be
}

// hear takes a frame.
func (h *hearing) hear(head ws.Header, payload string) {
	h.frames++
	switch {
	case head.OpCode == ws.OpPing:
		h.pings = append(h.pings, payload)
		return
	case head.OpCode == ws.OpPong:
		h.pongs = append(h.pongs, payload)
		return
	case head.OpCode == ws.OpClose:
		return
	case head.OpCode == ws.OpContinuation && h.part == nil:
		h.fault = errors.Join(h.fault, fmt.Errorf("after %d messages a continuation %.40q of nothing", len(h.messages), payload))
		return
	case head.OpCode != ws.OpContinuation && h.part != nil:
		h.fault = errors.Join(h.fault, fmt.Errorf("after %d messages %v %.40q begins inside %v", len(h.messages), head.OpCode, payload, h.part))
		return
	case head.OpCode != ws.OpContinuation:
		h.part = &said{op: head.OpCode}
	}
	h.part.payload += payload
	if head.Fin {
		h.messages = append(h.messages, *h.part)
		h.part = nil
	}
}

// heard is what bytes say.
func heard(wire []byte) *hearing {
	h, c := new(hearing), &rawConn{br: bufio.NewReader(bytes.NewReader(wire))}
	for {
		head, payload, err := c.receive()
		if err != nil {
			return h
		}
		h.hear(head, payload)
	}
}

// lines are what one side is to say.
type lines struct {
	name   string
	masked bool
	wire   []byte
	frames []int // where frames end
	hearing
}

func newLines(name string, masked bool) *lines { return &lines{name: name, masked: masked} }

func (s *lines) add(first byte, payload string) *lines {
	s.wire = append(s.wire, wireFrame(first, payload, s.masked, 0)...)
	s.frames = append(s.frames, len(s.wire))
	s.hear(ws.Header{Fin: first&fin != 0, OpCode: ws.OpCode(first & 0xf)}, payload)
	return s
}

// before is what the first n bytes of the lines say, without the pings.
func (s *lines) before(n int) *hearing { return heard(s.wire[:n]) }

// torn reports whether the proxy has passed on a part of a message, and not all of it,
// when it has got n bytes: whole frames, or MinFragment of one.
func (s *lines) torn(n int) bool {
	begin := 0
	for _, end := range s.frames {
		if end <= n {
			begin = end
		}
	}
	if s.before(begin).part != nil {
		return true
	}
	rest := s.wire[begin:n]
	h, err := ws.ReadHeader(bytes.NewReader(rest))
	return err == nil && len(rest)-ws.HeaderSize(h) >= frame.MinFragment
}

// smallLines has a short message of every form: in one frame, in several with pings in
// between, empty ones and empty fragments, every encoding of a short length.
func smallLines(masked bool) *lines {
	return newLines("small", masked).
		add(fin|text, "hello").
		add(text, "frag").add(fin|pingOp, "ping 1").add(more, "men").add(fin|pingOp, "").add(fin|more, "ted").
		add(fin|binaryOp, strings.Repeat("\x00\x81", 70)).
		add(fin|text, "").
		add(binaryOp, "").add(more, "\x81\x85").add(fin|more, "").
		add(fin|pingOp, "ping 3").
		add(fin|text, "one more").
		add(text, "and").add(fin|more, " the last")
}

// bigLines have a message of a size at which the proxy's buffers, or the encoding of
// the length, change; and one in fragments of such a size.
func bigLines(masked bool) (all []*lines) {
	fill := func(n int) string { return string(content{Kind: "binary", Size: n}.bytes()) }
	for _, size := range []int{125, 126, 452, 458, 466, 474, 480, frame.MinFragment, 65535, 65536, 72<<10 - 20, 72 << 10, 100_000} {
		all = append(all, newLines(strconv.Itoa(size), masked).
			add(fin|text, "first").add(fin|binaryOp, fill(size)).add(fin|text, "last"))
	}
	return append(all, newLines("fragments", masked).
		add(fin|text, "first").
		add(binaryOp, fill(500)).add(fin|pingOp, "in between").add(more, fill(70_000)).add(fin|pingOp, "once more").add(fin|more, fill(480)).
		add(fin|text, "last"))
}

// edges are positions in lines at which something changes, and their neighbours.
func (s *lines) edges() (all []int) {
	near := func(n int) {
		for d := -2; d <= 2; d++ {
			if n+d >= 0 && n+d <= len(s.wire) {
				all = append(all, n+d)
			}
		}
	}
	begin := 0
	for _, end := range s.frames {
		for _, n := range []int{0, 4, 8, 14, 466, 480, frame.MinFragment, frame.MinFragment + 14, 65536, 65550, 72 << 10} {
			if begin+n < end {
				near(begin + n)
			}
		}
		begin = end
	}
	near(len(s.wire))
	slices.Sort(all)
	return slices.Compact(all)
}

// every returns all positions in lines, or every nth in the short form of the tests.
func (s *lines) every(n int) (all []int) {
	if full {
		n = 1
	}
	for i := 0; i <= len(s.wire); i += n {
		all = append(all, i)
	}
	return all
}
