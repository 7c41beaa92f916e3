package handshake

import (
	"bufio"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
)

// maxResponseHeader bounds what a backend may send before the end of its
// response's header, in bytes; the default of net/http's Transport is ten times that.
const maxResponseHeader = 1 << 20

// maxInformational bounds the 1xx responses before the final one.
const maxInformational = 5

// Response is a backend's answer to a Request.
type Response struct {
	// HTTP is the response. If it is no 101 its body is still to be read from
	// the connection.
	HTTP *http.Response

	// The rest is of an accepted upgrade, a true 101, only.
	Upgraded    bool
	Subprotocol string
	Compression deflate.Agreement
	Early       []byte // what came after the header

	upstream Upstream
	latency  time.Duration // from the request to the end of the answer's header
}

// errors that mean that an answer is no WebSocket handshake.
var (
	errNoUpgrade = errors.New("backend answered 101 without upgrading to websocket")
	errAccept    = errors.New("backend answered with a wrong Sec-WebSocket-Accept")
)

// Do sends q over conn to an upstream and reads its answer. An error means that no
// usable answer came: connection errors and timeouts as they are, everything
// else is a bad answer. The caller bounds the time by conn's deadlines, and
// closes conn unless it takes the tunnel.
func (q *Request) Do(conn io.ReadWriter, to Upstream) (*Response, error) {
	q, err := q.to(&to)
	if err != nil {
		return nil, fmt.Errorf("preparing handshake: %w", err)
	}
	began := time.Now()
	var nonce [16]byte
	rand.Read(nonce[:])
	key := base64.StdEncoding.EncodeToString(nonce[:])
	if _, err := conn.Write(q.wire(key)); err != nil {
		return nil, fmt.Errorf("sending handshake: %w", err)
	}
	source := &errorKeeper{r: conn}
	limited := &io.LimitedReader{R: source, N: maxResponseHeader}
	br := bufio.NewReader(limited)
	res, err := readFinal(br) //nolint:bodyclose // it is read from conn, which is closed by the caller
	if err != nil {
		switch {
		case source.err != nil:
			err = source.err // the parser calls half a line malformed
		case limited.N <= 0:
			err = errors.New("the response header is too long")
		}
		return nil, fmt.Errorf("reading handshake response: %w", err)
	}
	answer := &Response{HTTP: res, upstream: to, latency: time.Since(began)}
	if res.StatusCode != http.StatusSwitchingProtocols {
		limited.N = math.MaxInt64 // the body is for the client, who asked for it
		return answer, nil
	}
	if err := q.upgrade(answer, br, key); err != nil {
		return nil, err
	}
	return answer, nil
}

// errorKeeper remembers why reading ended, if it was not the end of the stream.
type errorKeeper struct {
	r   io.Reader
	err error
}

func (k *errorKeeper) Read(p []byte) (int, error) {
	n, err := k.r.Read(p)
	if err != nil && err != io.EOF {
		k.err = err
	}
	return n, err
}

// readFinal reads responses until one is no 1xx, but for 101 (RFC 9110 §15.2).
func readFinal(br *bufio.Reader) (*http.Response, error) {
	for range maxInformational + 1 {
		res, err := http.ReadResponse(br, &http.Request{Method: http.MethodGet})
		if err != nil || res.StatusCode >= 200 || res.StatusCode == http.StatusSwitchingProtocols {
			return res, err
		}
	}
	return nil, errors.New("too many 1xx responses")
}

// upgrade checks a 101 (RFC 6455 §4.1): a tunnel is opened for nothing less.
func (q *Request) upgrade(answer *Response, br *bufio.Reader, key string) error {
	res := answer.HTTP
	if !httpguts.HeaderValuesContainsToken(res.Header["Upgrade"], "websocket") ||
		!httpguts.HeaderValuesContainsToken(res.Header["Connection"], "upgrade") {
		return errNoUpgrade
	}
	if !exactly(res.Header["Sec-Websocket-Accept"], AcceptKey(key)) {
		return errAccept
	}
	if chosen := res.Header["Sec-Websocket-Protocol"]; len(chosen) > 0 {
		if len(chosen) > 1 || !q.offers(chosen[0]) {
			return fmt.Errorf("backend chose a subprotocol that was not offered: %q", chosen)
		}
		answer.Subprotocol = chosen[0]
	}
	var err error
	if answer.Compression, err = q.offer.Accept(res.Header["Sec-Websocket-Extensions"]); err != nil {
		return fmt.Errorf("backend's extensions: %w", err)
	}
	if n := br.Buffered(); n > 0 {
		answer.Early = make([]byte, n)
		_, _ = io.ReadFull(br, answer.Early) // it is all there
	}
	answer.Upgraded = true
	return nil
}
