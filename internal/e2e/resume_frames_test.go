// This file has backends die at every byte of what they read and of what they write,
// and looks for messages that are torn, merged, split, missing or out of order at the
// other end.

package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

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

// How a backend dies.
const (
	byReset   = "RST"
	byFin     = "FIN"
	byGoodbye = "close frame" // 1012, and then what the kernel makes of what is unread
	// 1012, and it reads until it is answered: nothing is in doubt.
	byFarewell = "closing handshake"
)

// die ends a backend's connection.
func (c *rawConn) die(how string) {
	switch how {
	case byReset:
		c.reset()
	case byFin:
		_ = c.tcp().CloseWrite() // unread bytes would make a RST of a Close
		_, _ = io.Copy(io.Discard, c.br)
	case byGoodbye:
		_, _ = c.Write(frame.AppendClose(nil, 1012, "", false))
	}
	c.Close()
}

// stage has many plays before one Caddy. In each, the backend that accepts the client is
// to die, and another one takes over.
type stage struct {
	*proxy
	plays sync.Map // by number, in the query
	last  atomic.Int64
}

// play is what both backends do with a client.
type play interface {
	first(c *rawConn)
	second(c *rawConn, resume string)
}

// startStage runs Caddy before two backends, with a path for each set of options.
func startStage(t testing.TB, options map[string]string) *stage {
	t.Helper()
	s := new(stage)
	a, b := rawBackend(t, s.serve), rawBackend(t, s.serve)
	var site strings.Builder
	for path, o := range options {
		fmt.Fprintf(&site, "websocket_proxy /%s %s %s {\n name %s\n resume_interval 1ms 20ms\n %s\n}\n", path, a, b, path, o)
	}
	s.proxy = startCaddy(t, "", site.String())
	return s
}

func (s *stage) serve(r *http.Request, c *rawConn) {
	v, ok := s.plays.Load(r.URL.Query().Get("play"))
	if !ok || c.accept(r) != nil {
		return
	}
	if resume := r.Header.Get("Holdfast-Resume"); resume != "" {
		v.(play).second(c, resume)
	} else {
		v.(play).first(c)
	}
}

// enter opens a client for a play.
func (s *stage) enter(t testing.TB, path string, p play) *rawConn {
	t.Helper()
	id := strconv.FormatInt(s.last.Add(1), 10)
	s.plays.Store(id, p)
	_, c := rawRequest(t, s.addr, strings.Replace(rawUpgrade(s.addr, ""), "/chat?x=1", "/"+path+"?"+url.Values{"play": {id}}.Encode(), 1))
	return c
}

// together runs plays, some at a time.
func together[T any](plays []T, run func(T)) {
	var wg sync.WaitGroup
	next := make(chan T)
	for range 32 {
		wg.Go(func() {
			for p := range next {
				run(p)
			}
		})
	}
	for _, p := range plays {
		next <- p
	}
	close(next)
	wg.Wait()
}

// upPlay is a client that says something to a backend which dies when it has read a
// number of bytes. The next one greets, and listens.
type upPlay struct {
	*lines
	mode  string
	n     int
	death string
	// late: n is how many bytes the client has sent, of which the first backend has
	// read all frames that are whole.
	late  bool
	pongs bool // the first backend answers the proxy's pings

	got    chan []byte // what the first backend has read
	again  chan *hearing
	resume string // valid after again

	pongsOf []string // what the client got; valid after run
	ended   bool     // … which is that it was closed with 1012
}

func (p *upPlay) String() string {
	return fmt.Sprintf("%s, replay %s, %s at %d of %d, late %v, pongs %v", p.name, p.mode, p.death, p.n, len(p.wire), p.late, p.pongs)
}

func (p *upPlay) first(c *rawConn) {
	goodbye := func() { _, _ = c.Write(frame.AppendClose(nil, 1012, "", false)) }
	var wire bytes.Buffer
	source := io.Reader(c.Conn) // nothing is buffered above it: nothing has come before the 101
	switch {
	case p.late:
	case p.death == byFarewell:
		source = io.MultiReader(io.LimitReader(c.Conn, int64(p.n)), &then{Reader: c.Conn, do: goodbye})
	default:
		source = io.LimitReader(c.Conn, int64(p.n))
	}
	c.br = bufio.NewReader(io.TeeReader(source, &wire))
	want, h := p.before(p.n), new(hearing)
	// Frames may come in smaller pieces than they were sent.
	for !p.late || len(h.messages) < len(want.messages) || len(h.pings) < len(want.pings) {
		head, payload, err := c.receive()
		if err != nil || head.OpCode == ws.OpClose {
			break
		}
		if head.OpCode != ws.OpPing || len(payload) != 16 {
			h.hear(head, payload)
		} else if p.pongs {
			_, _ = c.Write(frame.Append(nil, ws.OpPong, []byte(payload), false))
		}
	}
	if p.late && p.death == byFarewell {
		goodbye()
		for head := (ws.Header{}); head.OpCode != ws.OpClose; {
			var err error
			if head, _, err = c.receive(); err != nil {
				break
			}
		}
	}
	p.got <- wire.Bytes()
	c.die(p.death)
}

// then is a Reader that does something before it is first read.
type then struct {
	io.Reader
	do func()
}

func (r *then) Read(p []byte) (int, error) {
	if r.do != nil {
		r.do()
		r.do = nil
	}
	return r.Reader.Read(p)
}

// theEnd is what the client says when it knows that there is another backend.
var theEnd = said{ws.OpText, "the end"}

func (p *upPlay) second(c *rawConn, resume string) {
	h := new(hearing)
	_, _ = c.Write(frame.Append(nil, ws.OpText, []byte("greetings"), false))
	for {
		head, payload, err := c.receive()
		if err != nil {
			break
		}
		h.hear(head, payload)
		if head.OpCode == ws.OpPing {
			_, _ = c.Write(frame.Append(nil, ws.OpPong, []byte(payload), false))
		}
		if head.OpCode == ws.OpClose {
			_, _ = c.Write(frame.Append(nil, ws.OpClose, []byte(payload), false))
			break
		}
	}
	p.resume = resume
	select {
	case p.again <- h:
	default: // a third one: the client tells
	}
}

func (p *upPlay) run(t testing.TB, s *stage) {
	p.got, p.again = make(chan []byte, 1), make(chan *hearing, 1)
	c := s.enter(t, p.mode, p)
	defer c.Close()
	var got []byte
	if p.late {
		_, _ = c.Write(p.wire[:p.n])
		got = <-p.got
		_, _ = c.Write(p.wire[p.n:])
	} else {
		// The client may be ended while it writes.
		if _, err := c.Write(p.wire); err != nil && p.mode == "unacked" {
			t.Errorf("%v: client's write: %v", p, err)
		}
	}

	h := new(hearing)
	var closed says
	for {
		head, payload, err := c.receive()
		if err != nil {
			t.Errorf("%v: the client is cut off after %v: %v", p, h.messages, err)
			return
		}
		h.hear(head, payload)
		if head.OpCode == ws.OpText && payload == "greetings" {
			c.send(t, theEnd.op, theEnd.payload)
			c.sendClose(t, 1000, "")
		}
		if head.OpCode == ws.OpClose {
			closed = says{uint16(payload[0])<<8 | uint16(payload[1]), payload[2:]}
			break
		}
	}
	if !p.late {
		got = <-p.got
	}
	before := heard(got)
	if k := len(before.messages); before.fault != nil || k > len(p.messages) || !slices.Equal(before.messages, p.messages[:k]) {
		t.Errorf("%v: the first backend got %v, %v; want the first of %v", p, before.messages, before.fault, p.messages)
		return
	}
	if closed.code == 1012 {
		c.sendClose(t, 1012, "")
		p.ended = true
		if p.mode != "strict" && p.mode != "streamed" || p.death == byFarewell && !p.streams() {
			t.Errorf("%v: the client was ended: %+v", p, closed)
		}
		return
	}
	if closed != (says{1000, ""}) {
		t.Errorf("%v: the client was ended: %+v", p, closed)
		return
	}
	p.pongsOf = h.pongs
	// In which order is TestPongsInOrder's.
	if !slices.Equal(slices.Sorted(slices.Values(h.pongs)), slices.Sorted(slices.Values(p.pings))) {
		t.Errorf("%v: pongs that the client got: %q, want %q", p, h.pongs, p.pings)
	}
	p.check(t, len(before.messages), <-p.again)
}

// streams reports whether there is a message that the proxy cannot keep.
func (p *upPlay) streams() bool {
	return p.mode == "streamed" && slices.ContainsFunc(p.messages, func(m said) bool { return len(m.payload) > 30<<10 })
}

// check compares what both backends got, of which the first one has read whole messages
// completely.
func (p *upPlay) check(t testing.TB, whole int, after *hearing) {
	if after.fault != nil || after.part != nil {
		t.Errorf("%v: what the second backend got: %v, part %v", p, after.fault, after.part)
	}
	all := append(slices.Clone(p.messages), theEnd)
	begin := len(all) - len(after.messages)
	if begin < 0 || !slices.Equal(after.messages, all[begin:]) {
		t.Errorf("%v: the second backend got %v, want the last of %v", p, after.messages, all)
		return
	}
	var attempt, replayed, cause int
	if _, err := fmt.Sscanf(p.resume, "attempt=%d, replayed=%d, cause=%d", &attempt, &replayed, &cause); err != nil {
		t.Errorf("%v: Holdfast-Resume: got %q", p, p.resume)
	}
	want := 1006
	if p.death == byGoodbye || p.death == byFarewell {
		want = 1012
	}
	if cause != want || attempt != 1 {
		t.Errorf("%v: Holdfast-Resume: got %q, want attempt 1 and cause %d", p, p.resume, want)
	}
	repeats, missing := whole-begin, begin-whole
	if p.death == byFarewell && (repeats > 0 || replayed > 0 || missing > 0 && p.mode != "off") {
		t.Errorf("%v: the first backend read %d messages and was answered, the second one got the last %d of %d, and %q",
			p, whole, len(after.messages), len(all), p.resume)
	}
	switch p.mode {
	case "unacked", "streamed":
		if missing > 0 {
			t.Errorf("%v: %d messages are lost: the first backend read %d, the second one got the last %d of %d", p, missing, whole, len(after.messages), len(all))
		}
	case "unsent":
		if repeats > 0 {
			t.Errorf("%v: %d messages came twice", p, repeats)
		}
	case "strict":
		if repeats != 0 {
			t.Errorf("%v: %d messages came twice, or were lost if that is negative", p, repeats)
		}
	case "off":
		if repeats > 0 {
			t.Errorf("%v: %d messages came twice", p, repeats)
		}
	}
	if repeats > replayed {
		t.Errorf("%v: %d messages came twice, %q allows less", p, repeats, p.resume)
	}
}

// replays are the sites of the tests of what clients say.
var replays = map[string]string{
	"unacked":  "",
	"unsent":   "replay unsent",
	"strict":   "replay strict",
	"off":      "replay off",
	"streamed": "replay_buffer 30KiB",
}

// What a client says while its backend dies at any byte arrives, as whole messages and
// in order.
func TestBackendDiesReading(t *testing.T) {
	s := startStage(t, replays)
	var plays []*upPlay
	small := smallLines(true)
	for mode := range replays {
		step := 7
		if mode == "unacked" {
			step = 1
		}
		// The first backend reads the proxy's pings as well: there is more to read.
		for _, n := range small.every(step) {
			for _, death := range []string{byReset, byFin, byGoodbye, byFarewell} {
				plays = append(plays,
					&upPlay{lines: small, mode: mode, n: n, death: death, pongs: n%2 == 1},
					&upPlay{lines: small, mode: mode, n: n, death: death, late: true, pongs: n%2 == 0})
				if full {
					plays = append(plays,
						&upPlay{lines: small, mode: mode, n: n, death: death, pongs: n%2 == 0},
						&upPlay{lines: small, mode: mode, n: n, death: death, late: true, pongs: n%2 == 1})
				}
			}
		}
	}
	together(plays, func(p *upPlay) { p.run(t, s) })
	checkEnded(t, plays)
}

// The same with messages for which the proxy's buffers are too small.
func TestBackendDiesReadingBig(t *testing.T) {
	s := startStage(t, replays)
	var plays []*upPlay
	for _, big := range bigLines(true) {
		for i, n := range big.edges() {
			for j, death := range []string{byReset, byFin, byGoodbye, byFarewell} {
				if !full && (i+j)%4 != 0 {
					continue
				}
				for mode := range replays {
					if !full && mode != "unacked" && (i/4+len(mode))%5 != 0 {
						continue
					}
					plays = append(plays,
						// What is larger than the buffer waits until all before it is acknowledged.
						&upPlay{lines: big, mode: mode, n: n, death: death, pongs: mode == "streamed" || i%2 == 0},
						&upPlay{lines: big, mode: mode, n: n, death: death, late: true, pongs: true})
				}
			}
		}
	}
	together(plays, func(p *upPlay) { p.run(t, s) })
	checkEnded(t, plays)
}

// checkEnded checks that where clients may be closed some were, and others were not.
func checkEnded(t testing.TB, plays []*upPlay) {
	t.Helper()
	all, ended := make(map[string]int), make(map[string]int)
	for _, p := range plays {
		all[p.mode]++
		if p.ended {
			ended[p.mode]++
		}
	}
	t.Logf("connections: %v, of which were closed: %v", all, ended)
	if n := ended["strict"]; n == 0 || n == all["strict"] {
		t.Errorf("strict: %d of %d clients were closed, want some", n, all["strict"])
	}
}

// Pongs come in the order of the client's pings, also of those that the lost backend has
// not answered and of those that it never got.
func TestPongsInOrder(t *testing.T) {
	s := startStage(t, replays)
	var plays []*upPlay
	small := smallLines(true)
	for n := range len(small.wire) {
		plays = append(plays, &upPlay{lines: small, mode: "unacked", n: n, death: []string{byReset, byFin, byGoodbye}[n%3], late: true})
	}
	together(plays, func(p *upPlay) { p.run(t, s) })
	var wrong []string
	for _, p := range plays {
		if !slices.Equal(p.pongsOf, p.pings) {
			wrong = append(wrong, fmt.Sprintf("%v: got %q", p, p.pongsOf))
		}
	}
	if len(wrong) > 0 {
		t.Errorf("pongs in another order than the pings %q: %d times, the first: %s", small.pings, len(wrong), wrong[0])
	}
}

// downPlay is a client to which a backend says something, and dies after a number of
// bytes. The next one greets, and closes when it is thanked.
type downPlay struct {
	*lines
	n     int
	death string
	early bool // the bytes come together with the handshake

	thanked chan *hearing
}

func (p *downPlay) String() string {
	return fmt.Sprintf("%s, %s at %d of %d, early %v", p.name, p.death, p.n, len(p.wire), p.early)
}

func (p *downPlay) first(c *rawConn) {
	_, _ = c.Write(p.wire[:p.n])
	c.die(p.death)
}

func (p *downPlay) second(c *rawConn, _ string) {
	h := new(hearing)
	_, _ = c.Write(frame.Append(nil, ws.OpText, []byte("greetings"), false))
	for {
		head, payload, err := c.receive()
		if err != nil || head.OpCode == ws.OpClose {
			break
		}
		h.hear(head, payload)
		if payload == "thanks" {
			_, _ = c.Write(frame.AppendClose(nil, 1000, "done", false))
		}
	}
	select {
	case p.thanked <- h:
	default: // a third one: the client tells
	}
}

func (p *downPlay) run(t testing.TB, s *stage) {
	p.thanked = make(chan *hearing, 1)
	c := s.enter(t, "unacked", p)
	defer c.Close()
	h := new(hearing)
	var closed says
	for closed.code == 0 {
		head, payload, err := c.receive()
		if err != nil {
			t.Errorf("%v: the client is cut off after %v: %v", p, h.messages, err)
			return
		}
		h.hear(head, payload)
		switch {
		case head.OpCode == ws.OpPing:
			c.send(t, ws.OpPong, payload)
		case head.OpCode == ws.OpText && payload == "greetings":
			c.send(t, ws.OpText, "thanks")
		case head.OpCode == ws.OpClose:
			closed = says{uint16(payload[0])<<8 | uint16(payload[1]), payload[2:]}
			c.sendClose(t, closed.code, "")
		}
	}
	want := p.before(p.n)
	torn := p.torn(p.n)
	wantClose := says{1000, "done"}
	if torn {
		wantClose = says{1012, "a message was cut off"}
	} else {
		want.messages = append(want.messages, said{ws.OpText, "greetings"})
	}
	if h.fault != nil || closed != wantClose || !slices.Equal(h.messages, want.messages) || !slices.Equal(h.pings, want.pings) || (h.part != nil) != torn {
		t.Errorf("%v: the client got %v, pings %q, part %v, %v, and %+v; want %v, pings %q, torn %v and %+v", p,
			h.messages, h.pings, h.part, h.fault, closed, want.messages, want.pings, torn, wantClose)
	}
	if h.part != nil {
		whole := p.messages[len(h.messages)]
		if h.part.op != whole.op || !strings.HasPrefix(whole.payload, h.part.payload) {
			t.Errorf("%v: the client got %v as the beginning of %v", p, h.part, whole)
		}
		return
	}
	select {
	case got := <-p.thanked:
		if got.fault != nil || !slices.Equal(got.messages, []said{{ws.OpText, "thanks"}}) {
			t.Errorf("%v: the second backend got %v, %v; want thanks", p, got.messages, got.fault)
		}
	case <-time.After(10 * time.Second):
		t.Errorf("%v: the second backend is not told the end", p)
	}
}

// A backend dies at any byte of what it says: the client gets whole messages and goes
// on, or is told with 1012 that one was cut off.
func TestBackendDiesWriting(t *testing.T) {
	s := startStage(t, map[string]string{"unacked": ""})
	var plays []*downPlay
	small := smallLines(false)
	for n := range len(small.wire) + 1 {
		plays = append(plays, &downPlay{lines: small, n: n, death: byFin}, &downPlay{lines: small, n: n, death: byReset})
		if n == 0 || slices.Contains(small.frames, n) {
			plays = append(plays, &downPlay{lines: small, n: n, death: byGoodbye})
		}
	}
	for _, big := range bigLines(false) {
		for i, n := range big.edges() {
			plays = append(plays, &downPlay{lines: big, n: n, death: byFin})
			if full || i%3 == 0 {
				plays = append(plays, &downPlay{lines: big, n: n, death: byReset})
			}
			if slices.Contains(big.frames, n) {
				plays = append(plays, &downPlay{lines: big, n: n, death: byGoodbye})
			}
		}
	}
	together(plays, func(p *downPlay) { p.run(t, s) })
	t.Logf("%d connections", len(plays))
}

// Backends that are real processes are killed while they send a lot, in messages that
// take the proxy several reads, and while they are sent a lot.
func TestBackendKilledInTheMiddle(t *testing.T) {
	a, b := startBackend(t, "gorilla", "a"), startBackend(t, "coder", "b")
	p := startCaddy(t, "", fmt.Sprintf("websocket_proxy %s %s {\n resume_interval 1ms 50ms\n}", a.addr, b.addr))
	const clients, lazy = 10, 2
	const rate = 20_000_000 // bytes per second to each client, in 50 messages
	var all []*flooded
	for i := range clients {
		_, c := rawRequest(t, p.addr, strings.Replace(rawUpgrade(p.addr, ""), "x=1", "stream="+strconv.Itoa(rate), 1))
		_ = c.SetDeadline(time.Now().Add(60 * time.Second))
		f := &flooded{id: i, conn: c, quit: make(chan struct{}), sent: make(chan struct{}), over: make(chan struct{})}
		all = append(all, f)
		t.Cleanup(func() { c.Close(); <-f.over; <-f.sent })
		go f.send()
		if i < lazy {
			_ = c.tcp().SetReadBuffer(64 << 10)
		} else {
			go f.read()
		}
	}
	// Those that do not read yet get messages with which their backends are stuck.
	pass(1500 * time.Millisecond)
	kill(t, a, b)
	for _, f := range all[:lazy] {
		go f.read()
	}
	a.restart(t)
	b.restart(t)
	for range long(2, 10) {
		for i, lost := range []*backendProcess{a, b} {
			pass(300 * time.Millisecond)
			[]func(testing.TB, ...*backendProcess){kill, killBusy}[i](t, lost)
			pass(200 * time.Millisecond)
			lost.restart(t)
		}
	}
	pass(300 * time.Millisecond)
	for _, f := range all {
		close(f.quit)
	}
	torn := 0
	for _, f := range all {
		<-f.sent
		select {
		case <-f.over:
		case <-time.After(20 * time.Second):
			t.Errorf("client %d: nobody answers its close frame", f.id)
			f.conn.Close()
			<-f.over
		}
	}
	for _, f := range all {
		switch {
		case f.fault != nil:
			t.Errorf("client %d: %v", f.id, f.fault)
		case f.closed == says{1012, "a message was cut off"}:
			torn++
			if f.heard.part == nil {
				t.Errorf("client %d: it was closed for a message that was cut off, but there is none", f.id)
			}
		case f.closed != says{1000, ""}:
			t.Errorf("client %d: closed with %+v", f.id, f.closed)
		}
	}
	for _, c := range backendConns(t, a, b) {
		id := senderOf(c)
		if id < 0 {
			continue
		}
		f := all[id]
		d := delivery{client: id, sent: f.count, conns: c}
		if f.closed.code == 1012 {
			d.ended = ending{Code: 1012, Clean: true}
		}
		for _, fault := range d.faults(promise{repeats: true, doubt: true}, 1006) {
			t.Error(fault)
		}
	}
	t.Logf("%d of %d clients were in the middle of a message", torn, clients)
	if torn < lazy {
		t.Errorf("clients in the middle of a message: got %d, want at least %d", torn, lazy)
	}
}

// flooded is a client to which backends send a lot and which sends a lot.
type flooded struct {
	id   int
	conn *rawConn
	mu   sync.Mutex // one writer at a time
	quit chan struct{}
	sent chan struct{} // closed by send
	over chan struct{} // closed by read

	count  int // messages sent, valid after sent
	heard  hearing
	closed says
	fault  error // these three are valid after over
}

// send sends numbered messages in fragments until quit, and then closes. It ends when
// the connection does.
func (f *flooded) send() {
	defer close(f.sent)
	for ; ; f.count++ {
		select {
		case <-f.quit:
			f.write(frame.AppendClose(nil, 1000, "", true))
			return
		case <-f.over:
			return
		case <-time.After(2 * time.Millisecond):
		}
		m := numbered(f.id, f.count)
		wire := wireFrame(text, m[:5], true, 0)
		wire = append(wire, wireFrame(fin|pingOp, "flood", true, 0)...)
		wire = append(wire, wireFrame(fin|more, m[5:], true, 0)...)
		if f.write(wire) != nil {
			return
		}
	}
}

func (f *flooded) write(wire []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	_, err := f.conn.Write(wire)
	return err
}

// read reads until a close frame, which it answers if it is not the answer, or the end.
func (f *flooded) read() {
	defer close(f.over)
	next := make(map[string]int) // number of the next message of each of the backends' connections
	for {
		head, payload, err := f.conn.receive()
		if err != nil {
			f.fault = errors.Join(f.fault, fmt.Errorf("cut off: %w", err))
			return
		}
		f.heard.hear(head, payload)
		if f.heard.fault != nil {
			f.fault = f.heard.fault
			return
		}
		switch head.OpCode {
		case ws.OpPing:
			_ = f.write(frame.Append(nil, ws.OpPong, []byte(payload), true))
		case ws.OpClose:
			f.closed = says{uint16(payload[0])<<8 | uint16(payload[1]), payload[2:]}
			if f.closed.code != 1000 {
				_ = f.write(frame.AppendClose(nil, f.closed.code, "", true))
			}
			return
		default:
		}
		for _, m := range f.heard.messages {
			at := strings.LastIndexByte(strings.TrimRight(m.payload, "."), ' ')
			n, err := strconv.Atoi(strings.TrimRight(m.payload, ".")[at+1:])
			who := m.payload[:at+1] // the same again with each process
			if err != nil || n != next[who] && n != 0 || !strings.HasSuffix(m.payload, ".") {
				f.fault = errors.Join(f.fault, fmt.Errorf("got %v, want message %d", m, next[who]))
				return
			}
			next[who] = n + 1
		}
		f.heard.messages = nil
	}
}
