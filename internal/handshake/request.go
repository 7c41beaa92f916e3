package handshake

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"slices"
	"strings"

	"golang.org/x/net/http/httpguts"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/headers"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
)

// IDHeader carries the connection's id to the backend.
const IDHeader = "Holdfast-Connection"

// Request is what goes to backends for one client: its request line and headers
// in wire form, without what differs at every dial. It holds nothing of the
// http.Request that it was made from.
type Request struct {
	head         []byte
	subprotocols string // as the client lists them: split, they could take many times the room
	offer        deflate.Negotiation
	resume       string
	late         *headers.HeaderOps // header_up, where it waits for the dial
	client       Client
	remote       string
	secure       bool
}

// Client is what the proxy knows of who sent a request.
type Client struct {
	ID      string // of the connection
	IP      string // as Caddy trusts it to be
	Trusted bool   // the request comes from a trusted proxy, whose X-Forwarded-* are continued
}

// hopHeaders are the headers that concern one hop, besides those that the
// Connection header names (RFC 9110 §7.6.1), as reverse_proxy has them.
var hopHeaders = []string{
	"Alt-Svc", "Connection", "Proxy-Connection", "Keep-Alive", "Proxy-Authenticate",
	"Proxy-Authorization", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Content-Length",
}

// dialHeaders are the proxy's own, of the handshake, or would say that there is a
// body, after which a backend would wait for one.
var dialHeaders = []string{
	"Sec-Websocket-Key", "Sec-Websocket-Version", "Sec-Websocket-Extensions", "Host", "Upgrade", "Connection",
	"Content-Length", "Transfer-Encoding", "Trailer",
}

// wireNames are the names of RFC 6455 §11.3, which net/http spells otherwise.
var wireNames = map[string]string{
	"Sec-Websocket-Protocol":   "Sec-WebSocket-Protocol",
	"Sec-Websocket-Extensions": "Sec-WebSocket-Extensions",
}

// NewRequest makes the request for the backends from r, which passed Check, with
// what h, which may be nil, changes. A host or a target that would break out of its
// line is an error: the server that received r refuses them, but a handler may have
// made them of what the client sent.
func NewRequest(r *http.Request, client Client, offer deflate.Negotiation, h *Headers) (*Request, error) {
	q := &Request{offer: offer, client: client, remote: r.RemoteAddr, secure: r.TLS != nil}
	header, host := r.Header.Clone(), r.Host
	stripHop(header)
	forwarded(header, r, client.Trusted)
	if h != nil {
		repl := replacer(r)
		// Of the client's own header: what it nominates as of one hop is not absent.
		if origin := repl.ReplaceKnown(h.DefaultOrigin, ""); origin != "" && len(r.Header["Origin"]) == 0 {
			header["Origin"] = []string{origin}
		}
		switch {
		case h.late != nil:
			q.late = h.late.of(repl)
		case h.Request != nil:
			if host = apply(h.Request, header, host, repl); host == "" {
				q.late = upstreamHost
			}
		}
	}
	if err := q.compose(r.URL.RequestURI(), host, header); err != nil {
		return nil, err
	}
	return q, nil
}

// NewProbe makes a request of the proxy's own, for no client: h is all that it
// carries besides the handshake, and must have none of its fields. It offers no
// extensions.
func NewProbe(target, host string, h http.Header) (*Request, error) {
	q := new(Request)
	if err := q.compose(target, host, h); err != nil {
		return nil, err
	}
	return q, nil
}

// compose makes the request's head. The target must be a path (RFC 9112 §3.2.1), which
// that of a client like `x:y` or a rewrite may not be, and no backend nor HTTP could
// read. Neither target nor host may break out of its line; fields that could are left out.
func (q *Request) compose(target, host string, h http.Header) error {
	if !strings.HasPrefix(target, "/") || strings.ContainsFunc(target, func(c rune) bool { return c <= ' ' || c == 0x7f }) {
		return fmt.Errorf("invalid request target %q", target)
	}
	return q.setHead("GET "+target+" HTTP/1.1\r\n", host, h)
}

// setHead sets the request line and the headers.
func (q *Request) setHead(line, host string, h http.Header) error {
	if !httpguts.ValidHostHeader(host) {
		return fmt.Errorf("invalid host %q", host)
	}
	var b bytes.Buffer
	b.WriteString(line + "Host: " + host + "\r\n")
	writeHeader(&b, h)
	q.head, q.subprotocols = bytes.Clone(b.Bytes()), strings.Join(h["Sec-Websocket-Protocol"], ",")
	return nil
}

// to returns the request for an upstream.
func (q *Request) to(up *Upstream) (*Request, error) {
	if q.late == nil {
		return q, nil
	}
	line, fields, _ := bytes.Cut(q.head, []byte("\n"))
	lines := io.MultiReader(bytes.NewReader(fields), strings.NewReader("\r\n"))
	parsed, err := textproto.NewReader(bufio.NewReader(lines)).ReadMIMEHeader()
	if err != nil {
		return nil, err
	}
	h := http.Header(parsed)
	host := h.Get("Host")
	h.Del("Host")
	if host = apply(q.late, h, host, lateReplacer(up)); host == "" {
		host = up.Address
	}
	dialed := *q
	if err := dialed.setHead(string(line)+"\n", host, h); err != nil {
		return nil, err
	}
	return &dialed, nil
}

// replacer returns the replacer of a request.
func replacer(r *http.Request) *caddy.Replacer {
	if repl, ok := r.Context().Value(caddy.ReplacerCtxKey).(*caddy.Replacer); ok {
		return repl
	}
	return caddy.NewEmptyReplacer()
}

// reserved reports whether a header is the proxy's own.
func reserved(name string) bool {
	return slices.Contains(dialHeaders, textproto.CanonicalMIMEHeaderKey(name)) || ownHeader(name)
}

// ownHeader reports whether a header's name is one of ours, also as CGI and its
// kin would read it, which turn both - and _ into _.
func ownHeader(name string) bool {
	const prefix = "holdfast-"
	return len(name) >= len(prefix) && strings.EqualFold(strings.ReplaceAll(name[:len(prefix)], "_", "-"), prefix)
}

// ResumeHeader tells a backend that it takes a connection over, and why.
const ResumeHeader = "Holdfast-Resume"

// Redial returns the request for a backend that comes after the first one, from
// which the client was told of the compression. resume is the value of ResumeHeader.
func (q *Request) Redial(told deflate.Agreement, resume string) *Request {
	again := *q
	again.offer, again.resume = told.Redial(), resume
	return &again
}

// HTTP returns the request as a server would have it, for what chooses a backend
// by it. It has what header_up changed, unless that waits for the backend.
func (q *Request) HTTP() (*http.Request, error) {
	r, err := http.ReadRequest(bufio.NewReader(io.MultiReader(bytes.NewReader(q.head), strings.NewReader("\r\n"))))
	if err == nil {
		r.RemoteAddr = q.remote
	}
	return r, err
}

// ClientIP is the client's address, as Caddy trusts it to be.
func (q *Request) ClientIP() string { return q.client.IP }

// Trusted reports whether the request came from a trusted proxy.
func (q *Request) Trusted() bool { return q.client.Trusted }

// wire returns the request as it goes to a backend with the given key.
func (q *Request) wire(key string) []byte {
	var b bytes.Buffer
	b.Write(q.head)
	if q.client.ID != "" { // else it is a probe
		b.WriteString(IDHeader + ": " + q.client.ID + "\r\n")
	}
	if q.resume != "" {
		b.WriteString(ResumeHeader + ": " + q.resume + "\r\n")
	}
	b.WriteString("Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + key + "\r\n")
	if offer := q.offer.Offer(); offer != "" {
		b.WriteString("Sec-WebSocket-Extensions: " + offer + "\r\n")
	}
	b.WriteString("\r\n")
	return b.Bytes()
}

// stripHop removes what concerns one hop only.
func stripHop(h http.Header) {
	for _, list := range h["Connection"] {
		for name := range strings.SplitSeq(list, ",") {
			h.Del(textproto.TrimString(name))
		}
	}
	for _, name := range hopHeaders {
		h.Del(name)
	}
}

// forwarded sets the X-Forwarded-* headers as reverse_proxy does: what an
// untrusted client sent is replaced, what a trusted proxy sent is continued.
func forwarded(h http.Header, r *http.Request, trusted bool) {
	ip, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		// A Unix socket has no address. Only a trusted peer may then speak for others.
		if !trusted {
			for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host"} {
				h.Del(name)
			}
			return
		}
		ip = ""
	}
	ip, _, _ = strings.Cut(ip, "%") // the zone of an IPv6 address

	if prior := strings.Join(h["X-Forwarded-For"], ", "); trusted && prior != "" {
		if ip != "" {
			prior += ", " + ip
		}
		h.Set("X-Forwarded-For", prior)
	} else if ip != "" {
		h.Set("X-Forwarded-For", ip)
	}
	proto := "http"
	if r.TLS != nil {
		proto = "https"
	}
	for name, own := range map[string]string{"X-Forwarded-Proto": proto, "X-Forwarded-Host": r.Host} {
		if prior := h[name]; trusted && len(prior) > 0 && prior[len(prior)-1] != "" {
			own = prior[len(prior)-1]
		}
		h.Set(name, own)
	}
}

// writeHeader writes h in a stable order, with the field's own spelling, but for what
// is the proxy's own. Values that could break out of a header line, which net/http
// has refused already and another handler may have set, are left out.
func writeHeader(b *bytes.Buffer, h http.Header) {
	names := make([]string, 0, len(h))
	for name := range h {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		spelled := name
		if s, ok := wireNames[name]; ok {
			spelled = s
		}
		if !httpguts.ValidHeaderFieldName(name) || reserved(name) {
			continue
		}
		for _, v := range h[name] {
			if httpguts.ValidHeaderFieldValue(v) {
				b.WriteString(spelled + ": " + v + "\r\n")
			}
		}
	}
}

// offers reports whether a subprotocol is among those that the client offers.
func (q *Request) offers(name string) bool {
	for offered := range strings.SplitSeq(q.subprotocols, ",") {
		if offered = textproto.TrimString(offered); offered == name && name != "" {
			return true
		}
	}
	return false
}
