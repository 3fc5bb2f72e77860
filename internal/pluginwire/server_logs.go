package pluginwire

import (
	"slices"

	"google.golang.org/grpc"

	"github.com/bivouac/bivouac/runtime"
	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// maxChunk is the maximum size of the input or output in one message, in bytes.
const maxChunk = 64 << 10

func (s *server) Logs(req *runtimev1.LogsRequest, stream grpc.ServerStreamingServer[runtimev1.LogsResponse]) error {
	reader, ok := s.driver.(runtime.LogReader)
	if !ok {
		return toStatus(unsupported(runtime.AbilityLogs))
	}
	query := runtime.LogQuery{
		Stream: streamFromProto(req.GetStream()), Task: req.GetTask(), Offset: req.GetOffset(), Follow: req.GetFollow(),
	}
	for chunk, err := range reader.Logs(stream.Context(), req.GetSessionId(), query) {
		if err != nil {
			return toStatus(err)
		}
		offset := chunk.Offset
		for data := range slices.Chunk(chunk.Data, maxChunk) {
			output := &runtimev1.Output{Stream: streams[chunk.Stream], Data: data, Offset: &offset}
			if err := stream.Send(&runtimev1.LogsResponse{Output: output}); err != nil {
				return err
			}
			offset += int64(len(data))
		}
	}
	return nil
}
